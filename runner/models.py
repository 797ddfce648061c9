"""Tokenizers and models, ready to train: pad token, chat template, precision, quantization."""

import hashlib
import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import disk, embedded, hardware, hub
from runner.errors import ConfigError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEY = "model.name_or_path"
BLOB = re.compile("[0-9a-f]{64}")  # a file of the hub's cache that is not in git: its SHA-256
PLAIN_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# Tokens that some family made for padding or never writes in a chat, best first. Each is taken only where it is
# in the vocabulary, is neither the stop token nor the first token, and is not part of the chat template.
PAD_TOKENS = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",  # GPT-NeoX, Pythia
    "<|finetune_right_pad_id|>",  # Llama 3.1, 3.2
    "<|endoftext|>",  # where <|im_end|> stops: Qwen, SmolLM2
    "<|fim_pad|>",  # Qwen's base models
    "<unk>",  # Llama 2, Mistral: bytes are their fallback
)


def local_path(name_or_path: str, revision: str | None = None, *, key: str = KEY, marker: str = "config.json") -> str:
    """Return where a model is: an absolute folder (the embedded model is built on first use) or a hub id.

    Raises:
        ConfigError: There is no such folder, the embedded model cannot be built, or the hub cannot be reached.
    """
    if name_or_path == embedded.NAME:
        return str(embedded.materialise())
    path = hub.resolve(name_or_path, key=key, marker=marker)
    hub.ensure_available(path, key=key, revision=revision, marker=marker)
    return path


def load_tokenizer(
    name_or_path: str,
    *,
    revision: str | None = None,
    tokenizer_name_or_path: str | None = None,
    chat_template: str | None = None,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedTokenizerBase":
    """Return a tokenizer that has a chat template, and a pad token that is not its stop token.

    Args:
        name_or_path: The model's folder or hub id.
        revision: The model's revision.
        tokenizer_name_or_path: Another folder or hub id to take the tokenizer from.
        chat_template: Path of a Jinja file; without one the model's own is kept, or ``chat_template.jinja`` of
            this package where it has none.
        pad_token: Token to pad with; without one it is the model's own, or chosen from its vocabulary, or new.
        trust_remote_code: Whether the repository's own code may run.

    Raises:
        ConfigError: It cannot be loaded, has no stop token, or the template or pad token cannot be used.
    """
    from transformers import AutoTokenizer

    key = KEY
    if tokenizer_name_or_path is not None:
        key, name_or_path, revision = "model.tokenizer_name_or_path", tokenizer_name_or_path, None
    path = local_path(name_or_path, revision, key=key, marker="tokenizer_config.json")
    with hub.explained(path, key=key):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"{key}={path} cannot be trained to stop: its tokenizer has no stop token (eos_token). Name a tokenizer "
            "that has one: model.tokenizer_name_or_path=..."
        )
    _set_chat_template(tokenizer, chat_template)
    _set_pad_token(tokenizer, pad_token)
    return tokenizer


def load_policy(name_or_path: str, *, tokenizer: "PreTrainedTokenizerBase", **options: Any) -> "PreTrainedModel":
    """Return a causal language model that fits ``tokenizer``; arguments are those of ``load``.

    Raises:
        ConfigError: It cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    model, missing = load(AutoModelForCausalLM, name_or_path, tokenizer=tokenizer, **options)
    if missing:
        raise ConfigError(
            f"{KEY}={name_or_path} is no language model: its files lack {', '.join(missing[:3])}. Name a model that "
            "generates text; a reward model goes to reward.model.name_or_path."
        )
    generation = model.generation_config
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        stops = generation.eos_token_id
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if tokenizer.eos_token_id not in stops:
            generation.eos_token_id = [tokenizer.eos_token_id, *stops]
    return model


def load_classifier(
    name_or_path: str, *, tokenizer: "PreTrainedTokenizerBase", scores: bool = False, **options: Any
) -> "PreTrainedModel":
    """Return a sequence classifier with one score that fits ``tokenizer``.

    Where the model had no score head, it gets a random one, and ``new_head`` is true.

    Args:
        name_or_path: A folder or a hub id; an adapter's folder gives its base with the adapter merged in.
        tokenizer: What ``load_tokenizer`` gave.
        scores: Whether it is to score others, which a random head cannot.
        options: The other keywords of ``load``.

    Raises:
        ConfigError: It cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    model, absent = load(AutoModelForSequenceClassification, name_or_path, tokenizer=tokenizer, num_labels=1, **options)
    if absent and scores:
        logger.warning(
            "%s is no reward model: its files lack %s, so its scores are those of a random head. Name one that has "
            "learnt to score, for example what trainer=reward left: name_or_path=<run>/model",
            *(name_or_path, ", ".join(absent)),
        )
    elif absent:
        logger.warning("%s has no score head: %s starts anew", name_or_path, ", ".join(absent))
    model.new_head = bool(absent)
    return model


def load(
    kind: Any, name_or_path: str, *, tokenizer: "PreTrainedTokenizerBase", revision: str | None = None,
    dtype: str = "auto", attn_implementation: str | None = None, trust_remote_code: bool = False,
    allow_pickle: bool = False, quantization: "BitsAndBytesConfig | None" = None, adapter: bool = False, **labels: int,
) -> tuple[Any, list[str]]:  # fmt: skip
    """Return a model of an auto class that fits ``tokenizer``, and the weights that its files lack.

    Args:
        kind: The class.
        name_or_path: A folder or a hub id; an adapter's folder gives its base with the adapter merged in.
        tokenizer: What ``load_tokenizer`` gave; the embedding grows to it, the special tokens follow it.
        revision: Branch, tag or commit of a hub id.
        dtype: ``auto`` is float32 for weights that train; see ``hardware.weights_dtype``.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; null leaves it to transformers.
        trust_remote_code: Whether the repository's own code may run.
        allow_pickle: Whether weights may be read that are not safetensors.
        quantization: How to quantize the frozen weights; the model comes back prepared for an adapter.
        adapter: Whether only an adapter will train, in mixed precision, so that the weights may be in bfloat16.
        labels: ``num_labels`` of a classifier.

    Raises:
        ConfigError: It cannot be loaded.
    """
    from accelerate import PartialState
    from transformers.utils import find_adapter_config_file

    path, device = local_path(name_or_path, revision), PartialState().device
    source: dict[str, Any] = {"trust_remote_code": trust_remote_code, "use_safetensors": None if allow_pickle else True}
    options: dict[str, Any] = {**source, **labels}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    with hub.explained(path, key=KEY):
        if find_adapter_config_file(path, revision=revision):
            path, revision = str(merge_adapter(path, tokenizer, revision, source)), None
        model, info = kind.from_pretrained(
            path,
            revision=revision or "main",
            dtype=hardware.weights_dtype(dtype, frozen=adapter, device=device.type),
            output_loading_info=True,
            **options,
        )
    fit_embedding(model, tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if quantization is not None:
        _prepare_quantized(model)
    logger.info("%s: %s, %s, on %s", name_or_path, type(model).__name__, model.dtype, device)
    return model, sorted(info["missing_keys"])


def folder_of(name: str, revision: str | None) -> Path:
    """Return where the files of a loaded model are: in its folder, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else Path(name)


def digest_weights(folder: Path) -> str | None:
    """Return a digest of the weight files in a folder, their names included; None where there are none.

    A file is read unless its SHA-256 is known: of what the runner built, and in the hub's cache, where it is the name.
    """
    digest = hashlib.sha256()
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*model*.bin")])
    for path in files:
        blob = path.resolve()
        known = blob.name if blob.parent.name == "blobs" and BLOB.fullmatch(blob.name) else embedded.recorded(path)
        digest.update(f"{path.name} {known or disk.digest(path)}\n".encode())
    return digest.hexdigest() if files else None


def fit_embedding(model: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Grow a model's embedding to its tokenizer; a new row is the mean of the old ones, so it says nothing.

    Embeddings are often larger than the vocabulary; those stay as they are.
    """
    import torch

    weight = model.get_input_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]
    needed = _highest(tokenizer, len(tokenizer)) + 1
    if needed <= rows:
        return
    if hasattr(weight, "ds_shape"):
        raise ConfigError(
            f"The model's embedding has {rows} rows and its tokenizer {needed} tokens: it cannot grow while DeepSpeed "
            "splits it. Choose a token that it has with model.pad_token=..., or launch=fsdp2."
        )
    model.resize_token_embeddings(needed, mean_resizing=False)
    logger.info("The embedding grew from %d to %d rows, for the tokenizer's new tokens", rows, needed)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[rows:] = layer.weight[:rows].mean(dim=0)


@lru_cache(maxsize=4)
def _highest(tokenizer: "PreTrainedTokenizerBase", size: int) -> int:
    """Return the highest token id of a tokenizer, which grows with its size; to list its vocabulary takes long."""
    return max(tokenizer.get_vocab().values())


def _set_chat_template(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> None:
    if chat_template is not None:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            raise ConfigError(f"model.chat_template={chat_template} does not exist. Name a .jinja file, or null.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        # Text models with a first token saw it before every text; the template has to write it itself.
        ids = tokenizer("a").input_ids
        begins = "{{- bos_token -}}\n" if ids and ids[0] == tokenizer.bos_token_id else ""
        tokenizer.chat_template = begins + PLAIN_TEMPLATE.read_text(encoding="utf-8")
        logger.info("The model has no chat template: it gets the plain one (%s)", PLAIN_TEMPLATE)
    from jinja2 import TemplateError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateError as error:
        raise ConfigError(
            f"model.chat_template={chat_template} cannot be used: {error}. Correct the file, or leave it null for the "
            "model's own."
        ) from error


def _set_pad_token(tokenizer: "PreTrainedTokenizerBase", pad_token: str | None) -> None:
    stop = tokenizer.eos_token
    if pad_token == stop:
        raise ConfigError(
            f"model.pad_token={pad_token} is the stop token: where padding is left out of the loss, the model would "
            "not learn to stop. Leave it null, or name another token."
        )
    own = tokenizer.pad_token
    if pad_token is None and own not in (None, stop):
        return
    vocabulary, used = tokenizer.get_vocab(), str(tokenizer.chat_template)
    if pad_token is None:
        spare = [
            token
            for token in PAD_TOKENS
            if token in vocabulary and token not in (stop, tokenizer.bos_token) and token not in used
        ]
        pad_token = spare[0] if spare else PAD_TOKENS[0]
    if pad_token in vocabulary:
        tokenizer.pad_token = pad_token
    else:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    origin = "of its vocabulary" if pad_token in vocabulary else "a new token"
    logger.info("Padding with %s, %s; the tokenizer's own is %s", pad_token, origin, own or "missing")


def merge_adapter(
    name_or_path: str,
    tokenizer: "PreTrainedTokenizerBase",
    revision: str | None = None,
    source: dict[str, Any] | None = None,
) -> Path:
    """Return a folder of the cache that has an adapter's base with the adapter merged in, in full precision.

    What trains on it, and a reference model read again from its path, then start from the adapted model.

    Args:
        name_or_path: The adapter.
        tokenizer: What ``load_tokenizer`` gave.
        revision: The adapter's.
        source: Keywords of ``from_pretrained`` that say what may be read of the base.

    Raises:
        ConfigError: The base cannot be loaded, or the adapter is pickled.
    """
    from huggingface_hub import snapshot_download
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns="adapter_*"))
    config = PeftConfig.from_pretrained(str(folder))
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"{KEY}={name_or_path} cannot be loaded: the adapter has no adapter_model.safetensors. Save it anew with "
            "peft, which writes that."
        )
    digest = hashlib.sha256()
    for file in sorted(folder.glob("adapter_*")):
        digest.update(file.read_bytes())

    def build(target: Path) -> None:
        base = local_path(str(config.base_model_name_or_path), config.revision)
        classifier = config.task_type == "SEQ_CLS"
        kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        options = {"num_labels": 1} if classifier else {}
        with hub.explained(base, key=KEY):
            model = kind.from_pretrained(
                base, revision=config.revision or "main", dtype="auto", **(source or {}), **options
            )
        fit_embedding(model, tokenizer)
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        PeftModel.from_pretrained(model, str(folder)).merge_and_unload().save_pretrained(target)
        tokenizer.save_pretrained(target)

    merged = embedded.build_once(f"merged-{digest.hexdigest()[:12]}", build)
    logger.info("%s is an adapter: its base with it merged in is kept in %s", name_or_path, merged)
    return merged


def _prepare_quantized(model: Any) -> None:
    """Freeze a quantized model, in place; what is not quantized keeps its dtype, as that of any frozen model."""
    for module in model.modules():
        # bitsandbytes 0.50 on CPUs with avx512_bf16 repacks 4-bit weights at the first evaluation, for a kernel
        # without a backward pass: training after it would lose most of its gradient without a word.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        parameter.requires_grad = False
        if parameter.device.type == "cpu" and parameter.is_floating_point():  # the file that it lies in stays mapped
            parameter.data = parameter.data.clone()
