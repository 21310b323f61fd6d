"""Long memory for a pretrained model of transformers, in place: attn_implementation="hsa", see hsa_tl.model.selected.

    import hsa_tl.model.hf_attention                  # registers it
    model.config.hsa = {"window": 1024, "topk": 32}   # if not the defaults of hsa-tl convert
    model.set_attn_implementation("hsa")

For the families that hsa-tl convert takes, in inference and training, with transformers' own dynamic cache. The cache
holds keys with their positions, which every call takes off again, so a converted run decodes faster.
"""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from hsa_tl.model.attention import rotate
from hsa_tl.model.convert import config_of
from hsa_tl.model.selected import Rule, chooser_of

NAME = "hsa"


def attend(
    module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, position_ids: torch.Tensor | None = None, cu_seq_lens_q: torch.Tensor | None = None, **_,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Heads' outputs [B, T, A, D] of rotated queries [B, A, T, D] and keys [B, H, P, D], as transformers calls it.

    ValueError: a setting or an argument that this attention does not have, by its name.
    """
    config, T, P = module.config, query.shape[2], key.shape[2]
    position = torch.arange(P, device=query.device)
    own = config_of(config, **getattr(config, NAME, {}))
    rule = Rule.of(own, module.layer_idx)
    for name, ok, must in (
        ("attention_mask", attention_mask is None, "hide nothing, so that each prompt stands alone or all are as long"),
        ("attention_dropout", not dropout, "be 0"),
        ("sliding_window", getattr(config, "sliding_window", None) is None, "be None"),
        ("position_ids", position_ids is None or bool((position_ids == position[P - T :]).all()),
         "count all tokens from 0, with a cache that grows"),
        ("cu_seq_lens_q", cu_seq_lens_q is None, "be None"),
    ):  # fmt: skip
        if not ok:
            raise ValueError(f"{name} must {must} for attn_implementation={NAME!r}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return rule.read_whole(rotate(q, -position[P - T :], rule.theta), k, v, chooser_of(own.selection), 1.0)[0], None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])  # None where nothing is hidden
