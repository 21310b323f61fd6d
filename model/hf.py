"""The model in Hugging Face `transformers` (the extra `hf`): config, AutoModelForCausalLM, generate, safetensors.

    model = HSAForCausalLM(HSAConfig(preset("tiny")))
    model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=20)

Importing this module registers both classes. `model.model` is the hsa_tl.model.Model.
"""

import difflib
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hsa_tl.model.config import ModelConfig
from hsa_tl.model.generate import SEGMENT, prefill
from hsa_tl.model.hf_inputs import CACHE_NAME, CACHE_NAMES, HSACache, Rows, one_cache, read_rows
from hsa_tl.model.model import Model
from hsa_tl.validation import require, require_integers, shape_of

# transformers' names of ModelConfig's fields
ALIASES = {
    "hidden_size": "dim", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "intermediate_size": "mlp_dim", "tie_word_embeddings": "tied",
}  # fmt: skip
REMOTE = "modeling_hsa_ultralong"  # the file beside saved weights by which Auto classes find this module


class HSAConfig(PretrainedConfig):
    """A ModelConfig as a PretrainedConfig.

    Args:
        model (ModelConfig or dict): its fields. Default: None, those of `tiny`.
        options: single fields, by their names or transformers' (vocab_size, hidden_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, intermediate_size, tie_word_embeddings), which go before model's;
            and what every PretrainedConfig takes, such as eos_token_id and pad_token_id.

    Raises:
        ValueError: no field of ModelConfig, or one out of range.
    """

    model_type = "hsa_ultralong"
    keys_to_ignore_at_inference = list(CACHE_NAMES)  # noqa: RUF012

    def __init__(self, model: ModelConfig | dict | None = None, **options):
        chosen = asdict(model) if isinstance(model, ModelConfig) else dict(model or {})
        for name, field in FIELDS.items():
            if name in options:
                chosen[field] = options.pop(name)
        self._set_model(chosen)
        for name in options.keys() - vars(PretrainedConfig()).keys():
            if meant := difflib.get_close_matches(name, FIELDS, 1, 0.8):
                raise ValueError(f"{name} must be a field of ModelConfig or PretrainedConfig, such as {meant[0]}")
        super().__init__(**options)
        require(not self.output_attentions, "output_attentions", "be False: HSA never holds attention weights", True)

    def _set_model(self, chosen: dict) -> None:
        try:
            self.model = asdict(ModelConfig(**chosen))
        except TypeError as error:
            raise ValueError(f"model must hold fields of ModelConfig: {error}") from None

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.model)

    def to_dict(self) -> dict:
        """Also under transformers' names, for what reads the dict or config.json."""
        return super().to_dict() | {name: self.model[FIELDS[name]] for name in (*ALIASES, "vocab_size", "head_dim")}


FIELDS = ALIASES | {field.name: field.name for field in fields(ModelConfig)}
for _name, _field in FIELDS.items():
    _get = lambda self, field=_field: self.model[field]  # noqa: E731
    _set = lambda self, value, field=_field: self._set_model(self.model | {field: value})  # noqa: E731
    setattr(HSAConfig, _name, property(_get, _set))


class HSAForCausalLM(PreTrainedModel, GenerationMixin):
    """Model as a PreTrainedModel; `model` is the hsa_tl.model.Model.

    Args:
        config (HSAConfig): its dims and options.
    """

    config_class = HSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch; otherwise Trainer divides by the accumulated batches
    _is_stateful = True
    _no_split_modules = ["Layer", "EncoderBlock"]  # noqa: RUF012
    _skip_keys_device_placement = CACHE_NAMES
    _input_embed_layer = "embedding"
    _tied_weights_keys = {"model.output.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: HSAConfig):
        super().__init__(config)
        self.model = Model(config.model_config)
        self.post_init()

    def _init_weights(self, module) -> None:
        """Model has initialised itself, all but the embeddings that a resize adds."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.model.config.embedding_std)

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
        kind = generation_config.cache_implementation
        require(kind in (None, "dynamic"), "cache_implementation", "be None, this model has its own", kind)
        cache = one_cache(*(model_kwargs.pop(name, None) for name in CACHE_NAMES))
        if cache is None and generation_config.use_cache is not False:
            cache = HSACache(max(1, max_cache_length))  # beams may widen the batch
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """None: the model counts, and so right where transformers does not, behind padding on the right."""

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, every_n_layers=1):
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False:
            # The reentrant form gives the chunk memory, a tuple of tensors, no gradient, and says nothing.
            raise ValueError("gradient_checkpointing_kwargs must hold use_reentrant=False, got another checkpoint")
        require(every_n_layers == 1, "every_n_layers", "be 1", every_n_layers)
        if enable:
            self.model.checkpoint = gradient_checkpointing_func
        self.model.config = replace(self.model.config, activation_checkpointing=enable)

    @property
    def gradient_checkpointing(self) -> bool:
        return self.model.config.activation_checkpointing

    def resize_token_embeddings(self, *args, **options) -> nn.Embedding:
        """As in transformers; the output head follows, tied or not."""
        embedding = super().resize_token_embeddings(*args, **options)
        self.model.config = replace(self.model.config, vocab_size=self.config.vocab_size)
        return embedding

    def save_pretrained(self, save_directory, *args, **options) -> None:
        """As in transformers, and a file by which Auto classes find this module (trust_remote_code=True)."""
        self.config.auto_map = {
            "AutoConfig": f"{REMOTE}.{HSAConfig.__name__}", "AutoModelForCausalLM": f"{REMOTE}.{type(self).__name__}"
        }  # fmt: skip
        super().save_pretrained(save_directory, *args, **options)
        if options.get("is_main_process", True):
            names = f"{HSAConfig.__name__}, {type(self).__name__}"
            text = f'"""Needs hsa-tl[hf]."""\n\nfrom {type(self).__module__} import {names}  # noqa: F401\n'
            (Path(save_directory) / f"{REMOTE}.py").write_text(text)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM") -> None:
        """Nothing to do: save_pretrained always writes what Auto classes need."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """As GenerationMixin's, without the tokenizer that `generate` takes for itself and passes on."""
        kwargs.pop("tokenizer", None)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, past_key_values: HSACache | None = None,
        inputs_embeds: torch.Tensor | None = None, labels: torch.Tensor | None = None, use_cache: bool | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, logits_to_keep: int | torch.Tensor = 0, *, cache: HSACache | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple:  # fmt: skip
        """Logits, the loss of labels, and a cache for what follows.

        Args:
            input_ids (Tensor [B, T], any integers): tokens. Default: None, where inputs_embeds are given.
            attention_mask (Tensor): 0 where a column holds no token, on either side: what stands there is taken out,
                and its logits are those of the token before. Bool, 0 and 1 or additive, [B, T], with a cache also of
                all its columns; or [B, 1, T, ...], where it says what the model does. Default: None, all tokens.
            position_ids (Tensor [B, T]): as the model counts, from 0; another 0 within a sequence begins a document
                that sees nothing of those before it (packing). Default: None.
            past_key_values, cache (HSACache): what was read before, under either of transformers' names. What runs
                through a cache that is not empty has no gradient. Default: None.
            inputs_embeds (Tensor [B, T, C]): instead of input_ids. Default: None.
            labels (Tensor [B, T], any integers): -100 is ignored; shifted here, within documents. Default: None.
            use_cache (bool): False returns none unless one was given. Default: None, as in the config, otherwise one
                that is read when it is used; none in training and for packed batches.
            output_attentions (bool): must not be True. Default: None.
            output_hidden_states (bool): also return the embedded tokens and each layer's output, the last one normed.
                Default: None, as in the config.
            return_dict (bool): False returns a tuple. Default: None, as in the config.
            logits_to_keep (int or Tensor): of the last so many columns, 0 for all, or the columns. Default: 0.
            num_items_in_batch (int or Tensor): what the loss's sum is divided by. Default: None, the labels here.

        Returns:
            CausalLMOutputWithPast: loss, logits [B, T, V] or of the columns to keep, past_key_values, hidden_states.

        Raises:
            ValueError, TypeError: what this model cannot do, by name.
        """
        config = self.config
        asked = config.output_attentions if output_attentions is None else output_attentions
        require(not asked, "output_attentions", "not be True: HSA never holds attention weights", True)
        one, got = (input_ids is None) != (inputs_embeds is None), "neither" if input_ids is None else "both"
        require(one, "input_ids or inputs_embeds", "be given, one of them", got)
        if input_ids is None:
            inputs, labels = self.model.validated(inputs_embeds, labels, "inputs_embeds", 3)
        else:
            inputs, labels = self.model.validated(input_ids, labels)
        given = one_cache(past_key_values, cache)
        rows = read_rows(inputs, attention_mask, position_ids, given)
        cache, through = self._choose_cache(given, use_cache, inputs, rows)
        if through and self.training and labels is not None and torch.is_grad_enabled():
            raise ValueError("past_key_values must be empty in training: what runs through them has no gradient")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        with torch.set_grad_enabled(torch.is_grad_enabled() and not through):
            loss, logits, states = self._run(
                inputs, rows, cache if through else None, labels, num_items_in_batch, output_hidden_states,
                logits_to_keep,
            )  # fmt: skip
        if cache is not None:
            if not through:
                cache.unread = rows.take(inputs).detach(), rows.lengths
            cache.columns += inputs.shape[1]
        out = CausalLMOutputWithPast(loss, logits, cache, states)
        return out if (config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _choose_cache(self, given: HSACache | None, use_cache: bool | None, inputs, rows: Rows):
        """The cache to return, and whether the tokens run through it now; if gradients are wanted, when it is used."""
        wanted = getattr(self.config, "use_cache", None) if use_cache is None else use_cache
        asked = given is not None or bool(wanted)
        if len(rows.lengths) > len(inputs):
            rule = "be False where position_ids or attention_mask pack documents"
            require(given is None and not use_cache, "use_cache", rule, "a cache")
            return None, False
        if given is None and (asked or (wanted is None and not self.training)):
            given = HSACache(inputs.shape[1])
        return given, asked and (given.columns > 0 or not torch.is_grad_enabled())

    def _run(self, inputs, rows: Rows, cache: HSACache | None, labels, num_items, with_states, logits_to_keep):
        """loss, logits and hidden states. cache: what the tokens run through."""
        (B, T), model = inputs.shape[:2], self.model
        columns, last = kept_columns(logits_to_keep, T)
        x, keep = rows.take(inputs), None
        if last and labels is None and not with_states and (rows.columns_RL is None or cache is not None):
            keep = min(last, x.shape[1])
        state = None if cache is None else cache.read(model, B)
        if state is not None and T > SEGMENT and keep == 1 and x.ndim == 2 and min(rows.lengths):
            prompts = [row[:n] for row, n in zip(x, rows.lengths, strict=True)]
            return None, prefill(model, prompts, state)[0][:, None], None
        states = [] if with_states else None
        h_RLC = model.hidden(x, state, keep, None if state is None else rows.lengths, states)
        logits, loss = model.head(rows.put(h_RLC, columns, keep)), None
        if labels is not None:
            target_RL = F.pad(rows.take(labels, -100)[:, 1:], (0, 1), value=-100)
            if columns == slice(None):
                target = rows.put(target_RL)
                target = target if rows.real_BT is None else target.masked_fill(~rows.real_BT, -100)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
            else:
                loss = model.loss_sum(h_RLC, target_RL)
            items = (target_RL != -100).sum() if num_items is None else num_items
            loss = loss / torch.as_tensor(items, device=loss.device).reshape(())
        if states is not None:
            states[-1] = model.norm(states[-1])
            states = tuple(map(rows.put, states))
        return loss, logits, states


def kept_columns(logits_to_keep: int | torch.Tensor, T: int) -> tuple[slice | torch.Tensor, int]:
    """The columns to keep, and how many they are if they are the last, 0 for all or others."""
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim:
        require(logits_to_keep.ndim == 1, "logits_to_keep", "be an int or 1-D", shape_of(logits_to_keep))
        return require_integers("logits_to_keep", logits_to_keep, -T, T), 0
    n = int(logits_to_keep)
    require(n >= 0, "logits_to_keep", "be at least 0", n)
    return (slice(-n, None), n) if 0 < n < T else (slice(None), n)


AutoConfig.register(HSAConfig.model_type, HSAConfig, exist_ok=True)
AutoModelForCausalLM.register(HSAConfig, HSAForCausalLM, exist_ok=True)
# `transformers serve` takes the class that a config names from the package, of which there are two lazy modules then.
type(transformers).HSAForCausalLM = HSAForCausalLM
