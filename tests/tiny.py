"""Random two-layer models and a 300-token tokenizer, built in memory: small enough to train in a test."""

from pathlib import Path
from typing import Any, Literal

Kind = Literal["llama", "neox"]

SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
PAIRS = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of"]
PAIRS += ["ed", "is", "it", "al", "ar", "st", "to", "nt", "ng", "se", "ha", "as", "ou", "io", "le"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% set body = (message['content'] or '') + eos_token %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ body }}{% endgeneration %}"
    "{% else %}{{ body }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(*, chat: bool = True, pad: bool = True, adds_bos: bool = False) -> Any:
    """Return a byte-level tokenizer: <|pad|> 0, <|bos|> 1, <|eos|> 2, four role tokens, then bytes and pairs.

    Args:
        chat: Whether it has a chat template (one special token a turn, <|eos|> after each).
        pad: Whether it has a pad token; without one it has no <|pad|> in its vocabulary either.
        adds_bos: Whether it puts <|bos|> before every text, as Llama's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL if pad else SPECIAL[1:]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *PAIRS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(pair[0], pair[1]) for pair in PAIRS]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", vocab["<|bos|>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>" if pad else None,
        additional_special_tokens=special[-4:],
        model_max_length=512,
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def tiny_model(kind: Kind, tokenizer: Any, *, seed: int = 0, vocab_size: int | None = None) -> Any:
    """Return a random two-layer float32 policy, Llama-like or GPT-NeoX, for ``tokenizer``."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GPTNeoXConfig, LlamaConfig

    shape: dict[str, Any] = {
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(**shape, num_key_value_heads=2) if kind == "llama" else GPTNeoXConfig(**shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def save_tiny(
    folder: Path,
    kind: Kind = "llama",
    *,
    seed: int = 0,
    chat: bool = True,
    pad: bool = True,
    adds_bos: bool = False,
    vocab_size: int | None = None,
) -> Path:
    """Write a tiny model and its tokenizer into ``folder`` and return it."""
    tokenizer = tiny_tokenizer(chat=chat, pad=pad, adds_bos=adds_bos)
    tiny_model(kind, tokenizer, seed=seed, vocab_size=vocab_size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
