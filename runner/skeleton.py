"""A model without its weights: what it is made of, counted on the meta device, and what a backward pass would keep."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runner import adapters, disk, estimate, hardware, hub, models, prefix_sharing
from runner.embedded import cache_dir
from runner.errors import ConfigError
from runner.estimate import Model, shape_read

NF4_BITS, INT8_BITS = 4.13, 8.02  # a number with its share of the scales (doubly quantized ones, of blocks of 64)
# Measured on Linux with a 135M model, in float32. What a forward pass keeps lies between what it frees, in pieces
# that glibc takes from one heap, where holes stay; larger ones are mapped one by one.   Source: mallopt(3)
HEAP_PIECE, HOLES = 32 * 2**20, 1.75

logger = logging.getLogger(__name__)


def count(
    node: dict[str, Any], *, tokenizer: Any, adapter: Any = None, classifier: bool = False, dtype: str = "float32",
    alike: tuple[int, ...] | None = None, **shape: Any,
) -> Model:  # fmt: skip
    """Return what a model of ``build`` is made of, from the disk if it was counted before.

    Trials of a sweep, and a run after its check, need the same. The file is named after what it follows from.

    Args:
        node: the model's config node.
        tokenizer: of the model; its embedding grows to it.
        adapter: an adapter's config for it, or None.
        classifier: whether it gives a score instead of text.
        dtype: of its weights.
        alike: tokens that its sequences begin with, as in ``estimate.Work``; None where each is read alone.
        shape: the other arguments of ``measure``, where each is read alone.

    Raises:
        ConfigError: its config cannot be read, or the adapter does not fit.
    """

    def make() -> Model:
        model = build(node, tokenizer=tokenizer, adapter=adapter, classifier=classifier, dtype=dtype)
        base = model.get_base_model() if adapter else model
        alone = alike is None or prefix_sharing.why_not(base, shape["arguments"], adapter)
        per_token = 0 if alone else prefix_sharing.token_cost(base.config)
        rows, length = shape_read(shape["sequences"], shape["length"], alike or (), per_token)
        return replace(measure(model, **shape | {"sequences": rows, "length": length}), per_token=per_token)

    if node.get("trust_remote_code"):
        return make()
    config, _ = _read_config(node, classifier=classifier)
    arguments = shape["arguments"]
    about = [config.to_json_string(use_diff=False), node.get("attn_implementation"), len(tokenizer), classifier, dtype]
    fields = sorted(adapter.to_dict().items()) if adapter else []
    about += [(name, sorted(value) if isinstance(value, set) else value) for name, value in fields]
    about += [shape["sequences"], shape["length"], shape["quantization"], alike]
    about += [getattr(arguments, key, None) for key in prefix_sharing.ASKED]
    about += [arguments.use_cpu, hardware.device_type(use_cpu=arguments.use_cpu), arguments.bf16, arguments.fp16]
    about += map(version, ("torch", "transformers", "peft", "trl"))
    sources = (__file__, estimate.__file__, prefix_sharing.__file__)
    about += [Path(source).read_text(encoding="utf-8") for source in sources]
    return Model(**disk.kept(cache_dir() / "counted", about, lambda: asdict(make())))


def _read_config(node: dict[str, Any], *, classifier: bool) -> tuple[Any, str]:
    """Return a model's config, and where it is; of an adapter's folder, that of its base, which it is merged into."""
    from peft import PeftConfig
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    revision, trust = node.get("revision"), bool(node.get("trust_remote_code"))
    path = models.local_path(node["name_or_path"], revision)
    with hub.explained(path, key=models.KEY):
        if find_adapter_config_file(path, revision=revision):
            base = PeftConfig.from_pretrained(path, revision=revision)
            path, revision = models.local_path(str(base.base_model_name_or_path), base.revision), base.revision
        labels = {"num_labels": 1} if classifier else {}
        config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=trust, **labels)
    return config, path


def build(node: dict[str, Any], *, tokenizer: Any, adapter: Any = None, classifier: bool = False,
          dtype: str = "float32") -> Any:  # fmt: skip
    """Return a model on the meta device, from its config alone, with its adapter; arguments are those of ``count``.

    Raises:
        ConfigError: its config cannot be read, or the adapter does not fit.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config, path = _read_config(node, classifier=classifier)
    auto: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    options = {"trust_remote_code": bool(node.get("trust_remote_code")), "dtype": getattr(torch, dtype)}
    with hub.explained(path, key=models.KEY), torch.device("meta"):
        model = auto.from_config(config, attn_implementation=node.get("attn_implementation"), **options)
        models.fit_embedding(model, tokenizer)
    if adapter is None:
        return model
    adapters.check_adapter(model, adapter)
    try:
        with torch.device("meta"):
            return get_peft_model(model, adapter)
    except ValueError as error:
        raise ConfigError(f"{type(adapter).__name__} does not fit {config.model_type}: {error}") from error


def measure(model: Any, *, sequences: int, length: int, quantization: dict[str, Any] | None, arguments: Any) -> Model:
    """Count a model of ``build``.

    Args:
        model: on the meta device.
        sequences: of a forward pass.
        length: their tokens.
        quantization: the config node of the frozen weights, or None.
        arguments: of the trainer, for precision.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, output = base.config.get_text_config(), base.get_output_embeddings()
    size = base.dtype.itemsize
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packed = [module.weight for module in _linear(base)] if quantization else []
    quantized = set(map(id, packed))
    bits = NF4_BITS if (quantization or {}).get("load_in_4bit") else INT8_BITS
    adapted = base is not model  # what trains is float32 then
    sizes = ((p, 4 if adapted and p.requires_grad else p.dtype.itemsize) for p in model.parameters())
    weights = sum(p.numel() * (bits / 8 if id(p) in quantized else size) for p, size in sizes)
    heads = config.num_attention_heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * (
        getattr(config, "num_key_value_heads", None) or heads
    )
    head = output.weight.numel() if output is not None and output.weight.requires_grad else 0
    kept = _kept(model, base, sequences, length, arguments)
    layers = config.num_hidden_layers
    half = 2 if arguments.bf16 or arguments.fp16 else 4
    return Model(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in trainable),
        by_module=_by_module(model, base),
        weights=weights,
        loading=4 * sum(p.numel() for p in base.parameters()) if quantization and arguments.use_cpu else 0,
        kept=kept,
        kept_checkpointed=4 * config.hidden_size * layers + kept / layers,
        cache=2 * width * layers * min(size, half),
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        head=head,
        tied=head if head and output.weight is base.get_input_embeddings().weight else 0,
        context=getattr(config, "max_position_embeddings", None) or 0,
        unit=max(weights / layers, base.get_input_embeddings().weight.nbytes),
        unpacked=(HOLES - 1) * 4 * sum(p.numel() for p in packed) if arguments.use_cpu else 0,
    )


def with_value_function(found: Model, mode: str, value: Model | None) -> Model:
    """Add PPO's value function to a policy.

    Args:
        found: the policy.
        mode: ``shared``, ``adapter`` or ``separate``.
        value: the model of ``separate``.
    """
    if value is not None:
        more, bytes_more = value.parameters, 4 * value.parameters
    else:
        more = found.hidden + 1 + (found.trainable if mode == "adapter" else 0)
        bytes_more = 4 * more
    return replace(
        found,
        parameters=found.parameters + more,
        trainable=found.trainable + more,
        by_module={**found.by_module, "value function": more},
        weights=found.weights + bytes_more,
    )


def _linear(base: Any) -> Iterator[Any]:
    """Yield the layers that bitsandbytes quantizes."""
    spared = {base.get_output_embeddings(), getattr(base, "score", None)}
    yield from (m for m in base.modules() if isinstance(m, nn.Linear) and m not in spared and "lora" not in str(m))


def _by_module(model: Any, base: Any) -> dict[str, int]:
    """Count what trains by the last name of the module that it is in or beside, such as ``q_proj``."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            words = name.removeprefix("base_model.model.").split(".")[:-1]
            words = [word for word in words if not word.isdigit() and word not in ("default", "base_layer")]
            inner = [word for word in words if not word.startswith(ADAPTED)]
            counts[(inner or words)[-1]] += parameter.numel()
    return dict(counts.most_common())


ADAPTED = ("lora_", "miss_", "randlora_", "oft_", "ia3_", "hada_", "vera_", "modules_to_save", "original_module")


def _kept(model: Any, base: Any, sequences: int, length: int, arguments: Any) -> float:
    """Return the bytes by token that a forward pass holds for the backward pass: run it on tensors without data.

    Where all layers are alike, two of them are run and then one: the others hold what the second did.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    config, inner = base.config.get_text_config(), base.base_model
    many = config.num_hidden_layers
    name = next((n for n, m in inner.named_children() if isinstance(m, nn.ModuleList) and len(m) == many), "")
    layers = getattr(inner, name) if name else []
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=hardware.device_type(use_cpu=arguments.use_cpu))
            base.tie_weights()
            if not _alike(layers, config):
                return _run_without_data(model, base, sequences, length, arguments)
            held = []
            for count in (2, 1):
                setattr(inner, name, nn.ModuleList(layers[:count]))
                held.append(_run_without_data(model, base, sequences, length, arguments))
            return held[1] + (held[0] - held[1]) * (many - 1)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        logger.info("Activations are a rule of thumb: the model cannot run without data (%s)", error)
        width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return 4 * many * (10 * config.hidden_size + 4 * width)
    finally:
        if name:
            setattr(inner, name, layers)


def _alike(layers: Any, config: Any) -> bool:
    shapes = {(type(layer), tuple(parameter.shape for parameter in layer.parameters())) for layer in layers}
    return len(shapes) == 1 and len(set(getattr(config, "layer_types", None) or [""])) == 1


def _run_without_data(model: Any, base: Any, sequences: int, length: int, arguments: Any) -> float:
    device = hardware.device_type(use_cpu=arguments.use_cpu)
    half = torch.bfloat16 if arguments.bf16 else torch.float16
    kept: dict[int, Any] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.ones((sequences, length), dtype=torch.long, device=device)
    model.train()
    autocast = torch.autocast(device, dtype=half, enabled=bool(arguments.bf16 or arguments.fp16))
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    pieces = [storage.nbytes() for storage in kept.values()]
    held = sum(piece * (HOLES if device == "cpu" and piece < HEAP_PIECE else 1) for piece in pieces)
    return held / (sequences * length)
