"""A policy with its value function and its reference, on one set of weights where they can share it.

With an adapter the base is loaded once: the policy is one adapter on it, the value function a second one with a head
(or only a head), the reference is the base alone. Sequences are padded on the right only, which causal attention
never sees, and only completion positions meet a head.

Shapes: b sequences of a batch, T completion positions, N selected positions, W tokens of the longest, H hidden size.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import modeling_utils

from runner import rl_math
from runner.errors import ConfigError

logger = logging.getLogger(__name__)
VALUE, REFERENCE = "ppo_value", "ppo_reference"  # adapters beside the policy's
HEAD_CELLS = 1 << 26  # logits that are held at a time


class Sequences(NamedTuple):
    """Some sequences: prompt and completion as token ids."""

    ids: list[list[int]]
    prompt_lengths: list[int]


class Reading(NamedTuple):
    """What a model says of completions, (b, T) each and zero where it was not asked."""

    logps: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None

    def fit(self, width: int) -> "Reading":
        """Return it with T = ``width``."""
        return Reading(*(None if x is None else nn.functional.pad(x, (0, width - x.size(1))) for x in self))


class ActorCritic(nn.Module):
    """Policy, value function and reference; what the Trainer trains.

    Args:
        policy: A causal language model, or an adapter model.
        value_mode: ``shared``, ``adapter`` or ``separate``.
        value_model: The sequence classifier of ``separate``.
        reference: A frozen model, ``REFERENCE`` for that adapter, ``"base"`` for no adapter, or None.
    """

    _is_accelerate_prepared = True  # accelerate must not wrap it in DDP: PPOTrainer adds the gradients up itself
    _of_policy = ("base_model", "active_peft_config", "generation_config", "device", "dtype", "generate",
                  "can_generate", "create_or_update_model_card", "get_input_embeddings")  # fmt: skip

    def __init__(self, policy: Any, value_mode: str, value_model: Any = None, reference: Any = None) -> None:
        super().__init__()
        self.policy, self.config, self.value_mode = policy, policy.config, value_mode
        if value_mode == "separate":
            self.value_model = value_model
        else:
            self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        for parameter in self.score.to(policy.device, torch.float32).parameters():
            nn.init.zeros_(parameter.requires_grad_(True))
        self.__dict__["reference"] = reference  # not a submodule: neither trained nor saved
        self.adapter = policy.active_adapter if hasattr(policy, "get_base_model") else None
        self.value_parameters = _trainable(value_model if value_mode == "separate" else self.value_head)
        if value_mode == "adapter":
            policy.set_adapter(VALUE)
            self.value_parameters += _trainable(policy)
        if self.adapter:
            policy.set_adapter(self.adapter)
        self.policy_parameters = _trainable(policy)
        self.require_gradients()
        _disable_dropout(self)
        self._plain_head = _has_plain_head(base_of(policy))
        parameters = inspect.signature(
            base_of(policy).forward
        ).parameters  # a mask is taken where all models slice alike
        self._keeps_logits = "logits_to_keep" in parameters and hasattr(modeling_utils, "slice_logits_to_keep")

    @property
    def own_value_model(self) -> Any:
        """The model of a separate value function, or None."""
        return self.value_model if self.value_mode == "separate" else None

    @property
    def score(self) -> nn.Module:
        """The value head."""
        return base_of(self.value_model).score if self.value_mode == "separate" else self.value_head

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name) if name in self._of_policy else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the policy."""
        return self.policy(*args, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Checkpoint activations of policy and value model; the Trainer calls this."""
        how = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        for model in [self.policy] + ([self.value_model] if self.value_mode == "separate" else []):
            base_of(model).activation_checkpointing_enable(how, **options)

    # ---- who plays whom -------------------------------------------------------------------------------------------

    def require_gradients(self) -> None:
        """Make all that is trained require gradients, which PEFT takes from an adapter that is not active."""
        for parameter in self.policy_parameters + self.value_parameters:
            parameter.requires_grad_(True)

    def prepare_gradients(self, role: str) -> None:
        """Let an adapter's gradients be there before the first backward pass of ``policy`` or ``value``.

        Each is small. Made one by one while activations go, they would stay between them, and of a heap on a CPU,
        which they cut into holes that no later activation fits into, two thirds would be empty.
        """
        for parameter in getattr(self, f"{role}_parameters") if self.adapter else []:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @contextlib.contextmanager
    def role(self, name: str) -> Iterator[Any]:
        """Give the model that plays ``policy``, ``value`` or ``reference``; afterwards the policy's adapter is active.

        A backward pass belongs inside: gradient checkpointing runs the layers again, with the adapter of that moment.
        """
        if name == "reference" and isinstance(self.reference, nn.Module):
            yield self.reference
        elif name == "value" and self.value_mode == "separate":
            yield self.value_model
        elif name == "policy" or (name == "value" and self.value_mode == "shared"):
            yield self.policy
        else:
            try:
                if name == "reference" and self.reference == "base":
                    with self.policy.disable_adapter():
                        yield self.policy
                else:
                    self.policy.set_adapter(VALUE if name == "value" else REFERENCE, inference_mode=name == "reference")
                    yield self.policy
            finally:
                self.policy.set_adapter(self.adapter)
                self.require_gradients()

    # ---- reading --------------------------------------------------------------------------------------------------

    def read(
        self,
        model: Any,
        batch: Sequences,
        mask: Tensor,
        *,
        temperature: float = 1.0,
        entropy: Literal["value", "gradient"] | None = None,
        value_mask: Tensor | None = None,
    ) -> Reading:
        """Return log-probabilities of completion tokens.

        Args:
            model: Policy or reference.
            batch: The sequences.
            mask: (b, T) tokens to score.
            temperature: What the logits are divided by.
            entropy: Whether the entropies are wanted, and whether with a gradient.
            value_mask: (b, T) where the values of a shared head are wanted.
        """
        base, ids = base_of(model), _pad(batch.ids, model.device)
        row, t, column = _positions(batch, mask)
        targets = ids[row, column + 1]
        if self._plain_head:
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            head, selected = base.get_output_embeddings(), hidden[row, column]
        else:
            wanted = torch.zeros_like(ids, dtype=torch.bool).index_put_((row, column), torch.tensor(True))
            kept = {"logits_to_keep": wanted} if self._keeps_logits else {}
            output = base(input_ids=ids, use_cache=False, output_hidden_states=value_mask is not None, **kept)
            hidden = output.hidden_states[-1] if value_mask is not None else None
            head, selected = nn.Identity(), output.logits if kept else output.logits[row, column]
        score = partial(_score_tokens, head, temperature, entropy)
        size = max(1, HEAD_CELLS // base.config.get_text_config().vocab_size)
        if len(targets) <= size:
            parts = [score(selected, targets)]
        else:  # in parts, and again in the backward pass: no more logits than that are ever held
            run = partial(checkpoint, score, use_reentrant=False) if torch.is_grad_enabled() else score
            parts = [run(*part) for part in zip(selected.split(size), targets.split(size), strict=True)]
        logps, entropies = (torch.cat(flat) for flat in zip(*parts, strict=True))
        return Reading(
            _spread(logps, row, t, mask.shape),
            _spread(entropies, row, t, mask.shape) if entropy else None,
            None if value_mask is None else self._value(hidden, batch, value_mask),
        )

    def read_values(self, model: Any, batch: Sequences, mask: Tensor, *, frozen: bool = False) -> Tensor:
        """Return (b, T) values of the states before the tokens where ``mask`` is True.

        Args:
            model: What plays the value function.
            batch: The sequences.
            mask: (b, T).
            frozen: Whether only the head gets a gradient.
        """
        ids = _pad(batch.ids, model.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            hidden = base_of(model).base_model(input_ids=ids, use_cache=False).last_hidden_state
        return self._value(hidden, batch, mask)

    def _value(self, hidden: Tensor, batch: Sequences, mask: Tensor) -> Tensor:
        row, t, column = _positions(batch, mask)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.score(hidden[row, column].float()).squeeze(-1)
        return _spread(values, row, t, mask.shape)

    # ---- files ----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the policy as a plain adapter or model, and its value function into ``value/`` beside it."""
        value = folder / "value"
        value.mkdir(parents=True, exist_ok=True)
        if self.adapter:
            _save_adapter(self.policy, self.adapter, folder)
        else:
            self.policy.save_pretrained(folder)
        if self.value_mode == "separate":
            self.value_model.save_pretrained(value)
            return
        if self.value_mode == "adapter":
            _save_adapter(self.policy, VALUE, value)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.value_head.state_dict().items()},
            value / "value_head.safetensors",
        )

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote.

        Raises:
            ConfigError: Weights are missing.
        """
        _load(self.policy, self.adapter, folder)
        if self.value_mode == "separate":
            _load(self.value_model, None, folder / "value")
            return
        if self.value_mode == "adapter":
            _load(self.policy, VALUE, folder / "value")
        self.value_head.load_state_dict(load_file(folder / "value" / "value_head.safetensors"))


def base_of(model: Any) -> Any:
    """Return the transformers model inside an adapter model, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---- pieces -------------------------------------------------------------------------------------------------------


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout to zero: with it the ratio of the first pass would not be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def _has_plain_head(base: Any) -> bool:
    """Whether logits are the output embeddings times the last hidden state, with no scale or cap after them."""
    ids = torch.tensor([[0, 1]], device=base.device)
    head, training = base.get_output_embeddings(), base.training
    if head is None:
        return False
    base.eval()
    ours = head(base.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    theirs = base(input_ids=ids, use_cache=False).logits
    base.train(training)
    return torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3)


def _pad(rows: list[list[int]], device: torch.device) -> Tensor:
    """Return (b, W) ids, filled up on the right with a token that nothing reads."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def _positions(batch: Sequences, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, completion position and column of every True: the column is that of the state before the token."""
    row, t = mask.nonzero(as_tuple=True)
    return row, t, torch.tensor(batch.prompt_lengths, device=mask.device)[row] - 1 + t


def _spread(flat: Tensor, row: Tensor, t: Tensor, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=flat.dtype, device=flat.device).index_put((row, t), flat)


def _score_tokens(
    head: nn.Module, temperature: float, entropy: str | None, hidden: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, (N,) each, of ids (N,) after hidden (N, H)."""
    logits = head(hidden).float()
    if temperature != 1:
        logits = logits / temperature
    logps = rl_math.token_logps(logits, ids)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
        return logps, rl_math.token_entropy(logits) if entropy else logps


def _save_adapter(model: Any, adapter: str, folder: Path) -> None:
    """Write one adapter flat into ``folder``; PEFT puts all but ``default`` into a folder of their own."""
    model.save_pretrained(folder, selected_adapters=[adapter])
    nested = folder / adapter
    if adapter != "default" and nested.is_dir():
        for path in nested.iterdir():
            path.replace(folder / path.name)
        nested.rmdir()


def _load(model: Any, adapter: str | None, folder: Path) -> None:
    """Load weights of ``folder`` into a model or one of its adapters."""
    state: dict[str, Tensor] = {}
    found: Any
    for path in sorted(folder.glob("adapter_model.safetensors" if adapter else "model*.safetensors")):
        state |= load_file(path)
    if adapter:
        from peft import set_peft_model_state_dict

        found = set_peft_model_state_dict(model, state, adapter_name=adapter)
        missing = [name for name in found.missing_keys if f".{adapter}." in name]
    else:
        if state.keys() - model.state_dict().keys():  # what some models save is converted, and back on loading
            state = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
        found = model.load_state_dict(state, strict=False)
        named = dict(model.named_parameters(remove_duplicate=False))
        loaded = {parameter.data_ptr() for name, parameter in named.items() if name in state}
        missing = [name for name in found.missing_keys if name not in named or named[name].data_ptr() not in loaded]
    if missing or found.unexpected_keys:
        raise ConfigError(
            f"Training cannot be resumed from {folder}: of the weights, {missing[:3] or 'none'} are missing and "
            f"{found.unexpected_keys[:3] or 'none'} belong to another model. Choose a complete checkpoint of this run."
        )
