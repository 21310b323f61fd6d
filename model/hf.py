"""The model in Hugging Face `transformers` (the extra `hf`): config, AutoModelForCausalLM, generate, safetensors.

    model = HSAForCausalLM(HSAConfig(preset("tiny")))
    model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=20)

Importing this module registers both classes. `model.model` is the hsa_tl.model.Model.
"""

from dataclasses import asdict

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hsa_tl.model.config import ModelConfig
from hsa_tl.model.generate import SEGMENT, prefill
from hsa_tl.model.model import Model


class HSAConfig(PretrainedConfig):
    """model: a ModelConfig or its fields, by default `tiny`'s; kept as a dict. More options: see PretrainedConfig."""

    model_type = "hsa_ultralong"

    def __init__(self, model: ModelConfig | dict | None = None, **options):
        fields = asdict(model) if isinstance(model, ModelConfig) else dict(model or {})
        try:
            config = ModelConfig(**fields | {"rope": tuple(fields.get("rope", ModelConfig.rope))})  # JSON has no tuples
        except TypeError as error:
            raise ValueError(f"model must hold fields of ModelConfig: {error}") from None
        self.model = asdict(config) | {"rope": list(config.rope)}
        super().__init__(**options | {"tie_word_embeddings": config.tied})

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.model | {"rope": tuple(self.model["rope"])})

    @property
    def vocab_size(self) -> int:
        return self.model["vocab_size"]


class HSACache(Cache):
    """An hsa_tl.model.cache.Cache, made by the first forward, where generate expects past_key_values. It only grows."""

    def __init__(self, capacity: int = 1 << 14):
        super().__init__(layers=[])
        self.state, self.capacity = None, capacity  # tokens of a sequence
        self.columns = 0  # of the attention mask that were read

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def _only_grows(self, *args, **options):
        raise NotImplementedError("past_key_values of this model only grow: beam search and assistants cannot use them")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _only_grows


class HSAForCausalLM(PreTrainedModel, GenerationMixin):
    """Model as a PreTrainedModel. attention_mask [B, columns]: 0 where a column holds no token of its sequence."""

    config_class = HSAConfig
    base_model_prefix = "model"
    _is_stateful = True
    _tied_weights_keys = {"model.output.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: HSAConfig):
        super().__init__(config)
        self.model = Model(config.model_config)
        self.post_init()

    def _init_weights(self, module) -> None:
        """Model has initialised itself."""

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value) -> None:
        self.model.embedding = value

    def get_output_embeddings(self):
        return self.model.output

    def set_output_embeddings(self, value) -> None:
        self.model.output = value

    @classmethod
    def from_pretrained(cls, name_or_path, *args, output_loading_info: bool = False, **options):
        """As in transformers, but a checkpoint that is truncated or of another model is a ValueError."""
        rule = f"{name_or_path} must hold all weights of this model"
        try:
            model, info = super().from_pretrained(name_or_path, *args, output_loading_info=True, **options)
        except SafetensorError as error:
            raise ValueError(f"{rule}, got a damaged file: {error}") from None
        except RuntimeError as error:
            raise ValueError(f"{rule}: {error}") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                raise ValueError(f"{rule}, got {kind.replace('_', ' ')} {sorted(map(str, info[kind]))}")
        return (model, info) if output_loading_info else model

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HSACache(max(1, max_cache_length))  # beams may widen the batch

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
        past_key_values: HSACache | None = None, labels: torch.Tensor | None = None, logits_to_keep: int = 0,
        use_cache: bool | None = None, return_dict: bool | None = True, **unused,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """logits [B, T, V] (0 for logits_to_keep: of all columns, else of each sequence's last so many tokens).

        Padding may stand on either side: it is taken out, and its logits are unspecified.
        """
        B, T = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -T:]
        order = mask.argsort(dim=1, descending=True, stable=True)  # the tokens first
        lengths = mask.sum(1).tolist()
        ids = input_ids.gather(1, order)
        if labels is not None:
            labels = torch.where(mask > 0, labels, -100).gather(1, order)
        if past_key_values is None:
            out = self.model(ids, labels=labels)
            logits, keep = out.logits, None
        else:
            if past_key_values.state is None:
                past_key_values.state = self.model.new_cache(B, capacity=past_key_values.capacity)
            state, keep = past_key_values.state, logits_to_keep or None
            past_key_values.columns += T
            if T > SEGMENT and keep == 1 and labels is None and min(lengths):
                rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
                return CausalLMOutputWithPast(None, prefill(self.model, rows, state)[0][:, None], past_key_values)
            out = self.model(ids, labels=labels, cache=state, logits_to_keep=keep, lengths=lengths)
            logits = out.logits
        if keep is None:
            logits = logits.gather(1, order.argsort(1)[..., None].expand_as(logits))[:, -logits_to_keep:]
        return CausalLMOutputWithPast(out.loss, logits, past_key_values)


AutoConfig.register(HSAConfig.model_type, HSAConfig)
AutoModelForCausalLM.register(HSAConfig, HSAForCausalLM)
