import copy
import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from runner import embedded, hub
from runner.adapters import check_adapter, keep_float32, peft_for
from runner.errors import ConfigError
from runner.models import (
    PLAIN_TEMPLATE,
    digest_weights,
    fit_embedding,
    folder_of,
    load_classifier,
    load_policy,
    load_tokenizer,
    local_path,
)

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye"},
]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(params=["llama", "neox"])
def model_dir(request):
    return request.getfixturevalue(f"{request.param}_dir")


def batch(rows=2, tokens=10, seed=0):
    return torch.randint(7, 290, (rows, tokens), generator=torch.Generator().manual_seed(seed))


# ---- pad token ----------------------------------------------------------------------------------------------


def with_special(folder, *tokens, **roles):
    """Save a tiny tokenizer without a pad token, with more tokens and with other special roles."""
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    tokenizer.save_pretrained(folder)
    return folder


def read_from(folder, **options):
    return load_tokenizer("not/read", tokenizer_name_or_path=str(folder), **options)


def test_a_pad_token_of_its_own_is_kept(llama_dir):
    assert load_tokenizer(str(llama_dir)).pad_token == "<|pad|>"


@pytest.mark.parametrize("token", ["<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|fim_pad|>"])
def test_a_spare_token_of_the_vocabulary_pads_and_none_is_added(tmp_path, token):
    tokenizer = read_from(with_special(tmp_path, token))
    assert tokenizer.pad_token == token
    assert len(tokenizer) == len(tiny_tokenizer(pad=False)) + 1  # the token that was there already


def test_a_pad_token_that_is_the_stop_token_is_replaced(tmp_path):
    tokenizer = read_from(with_special(tmp_path, "<|endoftext|>", pad_token="<|eos|>"))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|eos|>")


def test_the_stop_token_is_never_taken_for_padding(tmp_path):
    tokenizer = read_from(with_special(tmp_path, "<|endoftext|>", eos_token="<|endoftext|>"))
    assert tokenizer.pad_token == "<|pad|>"


def test_a_token_of_the_chat_template_is_never_taken_for_padding(tmp_path):
    folder = with_special(tmp_path, "<|endoftext|>")
    template = folder / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    assert read_from(folder, chat_template=str(template)).pad_token == "<|pad|>"


def test_without_a_spare_token_one_is_added_and_the_embedding_grows_to_it(tmp_path):
    folder = save_tiny(tmp_path, pad=False)
    tokenizer = load_tokenizer(str(folder))
    rows = len(tiny_tokenizer(pad=False))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", rows)
    model = load_policy(str(folder), tokenizer=tokenizer)
    before = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    after = model.get_input_embeddings().weight
    assert after.shape[0] == model.get_output_embeddings().weight.shape[0] == rows + 1
    torch.testing.assert_close(after[:rows], before)
    torch.testing.assert_close(after[rows], before.mean(dim=0))  # says nothing, and gets no more than its share
    assert model.config.pad_token_id == model.generation_config.pad_token_id == rows
    assert load_classifier(str(folder), tokenizer=tokenizer).get_input_embeddings().weight.shape[0] == rows + 1


def test_an_embedding_larger_than_the_vocabulary_stays_as_it_is():
    tokenizer = tiny_tokenizer()
    model = tiny_model("neox", tokenizer, vocab_size=320)
    fit_embedding(model, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == 320


def test_tied_weights_stay_tied_when_the_embedding_grows():
    tokenizer = tiny_tokenizer(pad=False)
    model = tiny_model("llama", tokenizer)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    fit_embedding(model, tokenizer)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_typed_pad_token_is_used_but_never_the_stop_token(llama_dir):
    assert load_tokenizer(str(llama_dir), pad_token="<|tool|>").pad_token == "<|tool|>"
    with pytest.raises(ConfigError, match=r"model.pad_token=<\|eos\|> is the stop token"):
        load_tokenizer(str(llama_dir), pad_token="<|eos|>")


def test_a_tokenizer_without_a_stop_token_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no stop token.*model.tokenizer_name_or_path"):
        read_from(tmp_path)


# ---- chat template ------------------------------------------------------------------------------------------


def test_a_model_without_a_template_gets_the_plain_one(tmp_path):
    tokenizer = load_tokenizer(str(save_tiny(tmp_path, chat=False)))
    assert tokenizer.chat_template == PLAIN_TEMPLATE.read_text()
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "System:\nBe short.\n\nUser:\nHi\n\nAssistant:\nHello<|eos|>\n\nUser:\nBye\n\nAssistant:\nGoodbye<|eos|>"
    )


def test_a_plain_prompt_is_the_beginning_of_prompt_and_answer(tmp_path):
    tokenizer = load_tokenizer(str(save_tiny(tmp_path, chat=False)))
    prompt = tokenizer.apply_chat_template(CHAT[:4], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "Goodbye<|eos|>"


def test_the_plain_template_marks_answers_and_their_stop_tokens_for_the_loss(tmp_path):
    tokenizer = load_tokenizer(str(save_tiny(tmp_path, chat=False)))
    found = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, on in zip(found["input_ids"], found["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(marked) == "Hello<|eos|>Goodbye<|eos|>"


def test_the_plain_template_keeps_tools_and_their_calls(tmp_path):
    tokenizer = load_tokenizer(str(save_tiny(tmp_path, chat=False)))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rows = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = tokenizer.apply_chat_template(
        rows, tools=[{"type": "function", "function": {"name": "add"}}], tokenize=False
    )
    assert text.startswith('Tools:\n[{"type": "function", "function": {"name": "add"}}]\n\nUser:\n1+1')
    assert text.endswith('"arguments": {"a": 1}}}]<|eos|>')


def test_the_plain_template_writes_the_first_token_where_the_tokenizer_would(tmp_path):
    tokenizer = load_tokenizer(str(save_tiny(tmp_path, chat=False, adds_bos=True)))
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_the_saved_tokenizer_renders_the_same_tokens(tmp_path):
    tokenizer = load_tokenizer(str(save_tiny(tmp_path / "base", chat=False, pad=False)))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
    assert again.pad_token_id == tokenizer.pad_token_id


def test_a_typed_template_is_used_and_a_bad_one_refused(tmp_path, llama_dir):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer = load_tokenizer(str(llama_dir), chat_template=str(path))
    assert tokenizer.apply_chat_template(CHAT[:2], tokenize=False) == "[Be short.][Hi]"
    path.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"model.chat_template=.*mine.jinja cannot be used"):
        load_tokenizer(str(llama_dir), chat_template=str(path))
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(str(llama_dir), chat_template=str(tmp_path / "none.jinja"))


def test_a_tokenizer_from_elsewhere_sets_what_the_model_stops_at(tmp_path, llama_dir):
    other = with_special(tmp_path, "<|end|>", eos_token="<|end|>", pad_token="<|tool|>")
    tokenizer = load_tokenizer(str(llama_dir), tokenizer_name_or_path=str(other))
    model = load_policy(str(llama_dir), tokenizer=tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|end|>"), 2]


# ---- models -------------------------------------------------------------------------------------------------


def test_weights_that_train_are_float32_also_when_saved_in_bfloat16(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_policy(str(tmp_path), tokenizer=tokenizer).dtype == torch.float32
    assert load_policy(str(tmp_path), tokenizer=tokenizer, dtype="bfloat16").dtype == torch.bfloat16


def test_attention_is_as_typed(llama_dir):
    tokenizer = load_tokenizer(str(llama_dir))
    model = load_policy(str(llama_dir), tokenizer=tokenizer, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"cannot be loaded: .* for example model.attn_implementation=sdpa"):
        load_policy(str(llama_dir), tokenizer=tokenizer, attn_implementation="fast")


def test_a_classifier_reads_the_last_token_before_the_padding(model_dir, caplog):
    tokenizer = load_tokenizer(str(model_dir))
    with caplog.at_level(logging.WARNING, logger="runner.models"):
        model = load_classifier(str(model_dir), tokenizer=tokenizer).eval()
    assert "has no score head" in caplog.text
    short = batch(rows=1, tokens=6)
    padded = torch.nn.functional.pad(short, (0, 4), value=tokenizer.pad_token_id)
    with torch.no_grad():
        alone = model(input_ids=short).logits
        torch.testing.assert_close(model(input_ids=padded, attention_mask=(padded != 0).long()).logits, alone)
    assert alone.shape == (1, 1)


def test_a_saved_classifier_keeps_its_score_head(tmp_path, model_dir, caplog):
    tokenizer = load_tokenizer(str(model_dir))
    model = load_classifier(str(model_dir), tokenizer=tokenizer)
    model.save_pretrained(tmp_path)
    caplog.clear()
    again = load_classifier(str(tmp_path), tokenizer=tokenizer)
    torch.testing.assert_close(again.score.weight, model.score.weight)
    assert "score head" not in caplog.text


def test_a_reward_model_is_refused_as_a_policy(tmp_path, llama_dir):
    tokenizer = load_tokenizer(str(llama_dir))
    load_classifier(str(llama_dir), tokenizer=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is no language model"):
        load_policy(str(tmp_path), tokenizer=tokenizer)


def test_an_adapter_folder_loads_as_its_base_with_the_adapter_in_it(tmp_path, model_dir, monkeypatch):
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(str(model_dir))
    base = load_policy(str(model_dir), tokenizer=tokenizer)
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=batch()).logits
        model = load_policy(str(tmp_path / "adapter"), tokenizer=tokenizer).eval()
        torch.testing.assert_close(model(input_ids=batch()).logits, expected, atol=1e-4, rtol=1e-4)
        reference = AutoModelForCausalLM.from_pretrained(model.config._name_or_path).eval()  # as TRL reads one
        torch.testing.assert_close(reference(input_ids=batch()).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_trained_score_adapter_loads_as_a_classifier(tmp_path, llama_dir, monkeypatch):
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(str(llama_dir))
    config = peft_for(LoraConfig(target_modules="all-linear", init_lora_weights=False), trainer="reward")
    adapted = get_peft_model(load_classifier(str(llama_dir), tokenizer=tokenizer), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=batch()).logits
        model = load_classifier(str(tmp_path / "adapter"), tokenizer=tokenizer).eval()
        torch.testing.assert_close(model(input_ids=batch()).logits, expected, atol=1e-4, rtol=1e-4)


# ---- quantization -------------------------------------------------------------------------------------------


def quantizations():
    return {"nf4": NF4, "int8": BitsAndBytesConfig(load_in_8bit=True)}


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize(("asked", "kept"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_quantized_model_is_frozen_and_the_rest_of_it_has_the_dtype_of_any_model(model_dir, name, asked, kept):
    tokenizer = load_tokenizer(str(model_dir))
    model = load_policy(str(model_dir), tokenizer=tokenizer, dtype=asked, quantization=quantizations()[name])
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_input_embeddings().weight.dtype == kept
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}


def test_what_8_bit_layers_do_in_every_pass_is_not_said_in_every_pass(llama_dir, caplog):
    tokenizer = load_tokenizer(str(llama_dir))
    model = load_policy(str(llama_dir), tokenizer=tokenizer, quantization=quantizations()["int8"])
    model(input_ids=batch())
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@pytest.mark.skipif(sys.platform != "linux", reason="tells what is mapped")
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_file_of_a_quantized_model_does_not_stay_in_memory(llama_dir, name):
    tokenizer = load_tokenizer(str(llama_dir))
    model = load_policy(str(llama_dir), tokenizer=tokenizer, quantization=quantizations()[name])
    assert model.is_quantized
    assert str(llama_dir) not in Path("/proc/self/maps").read_text()


def gradients(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_an_evaluation_leaves_the_gradients_of_a_4_bit_model_as_they_were(llama_dir):
    # On CPUs with avx512_bf16, bitsandbytes 0.50 would now train through a kernel that has no backward pass.
    tokenizer = load_tokenizer(str(llama_dir))
    model = load_policy(str(llama_dir), tokenizer=tokenizer, quantization=copy.deepcopy(NF4))
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    before = gradients(model, batch())
    with torch.no_grad():
        model.eval()(input_ids=batch())
    after = gradients(model, batch())
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient)


def test_a_quantized_reward_model_scores_after_trl_cast_what_trains(llama_dir):
    tokenizer = load_tokenizer(str(llama_dir))
    model = load_classifier(str(llama_dir), tokenizer=tokenizer, quantization=copy.deepcopy(NF4))
    model = get_peft_model(model, peft_for(LoraConfig(target_modules="all-linear"), trainer="reward"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # what trl 1.16's trainers do to quantized models
    with pytest.raises(RuntimeError, match="dtype"):
        model(input_ids=batch())
    keep_float32(model)
    model(input_ids=batch()).logits.sum().backward()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    head = [p for name, p in model.named_parameters() if "score" in name and p.requires_grad]
    assert len(head) == 1
    assert head[0].grad.abs().sum() > 0


def test_a_score_head_that_trains_in_float32_reads_a_body_in_bfloat16(llama_dir):
    tokenizer = load_tokenizer(str(llama_dir))
    model = load_classifier(str(llama_dir), tokenizer=tokenizer, dtype="bfloat16", adapter=True)
    model = get_peft_model(model, peft_for(LoraConfig(target_modules="all-linear"), trainer="reward"))
    keep_float32(model)
    scores = model(input_ids=batch()).logits
    scores.sum().backward()
    assert scores.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=batch()).logits.dtype == torch.bfloat16


def test_what_trains_whole_may_be_called_by_keyword(llama_dir):
    model = load_policy(str(llama_dir), tokenizer=load_tokenizer(str(llama_dir)), dtype="bfloat16", adapter=True)
    config = LoraConfig(target_modules=["up_proj"], modules_to_save=["self_attn"])
    keep_float32(model := get_peft_model(model, config))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=batch()).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "modules_to_save" in name)


def test_dora_on_8_bit_weights_is_refused_without_a_gpu(llama_dir):
    tokenizer = load_tokenizer(str(llama_dir))
    model = load_policy(str(llama_dir), tokenizer=tokenizer, quantization=BitsAndBytesConfig(load_in_8bit=True))
    if model.device.type == "cpu":
        with pytest.raises(ConfigError, match="peft=dora cannot train on quantization=int8"):
            check_adapter(model, LoraConfig(use_dora=True, target_modules="all-linear"))


# ---- where models come from ---------------------------------------------------------------------------------


def test_a_folder_becomes_absolute_so_that_an_adapter_finds_its_base(llama_dir, monkeypatch):
    monkeypatch.chdir(llama_dir.parent)
    assert local_path(llama_dir.name) == local_path(f"./{llama_dir.name}") == str(llama_dir)


@pytest.mark.parametrize("name", ["/no/such/model", "./missing", "a/b/c", "~/nowhere/at/all", "two words"])
def test_a_path_that_does_not_exist_is_told_at_once(name):
    with pytest.raises(ConfigError, match=r"model.name_or_path=.* does not exist: there is no folder"):
        local_path(name)


def test_a_run_directory_is_answered_with_the_model_in_it(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=f"Did you mean model.name_or_path={tmp_path / 'model'}"):
        local_path(str(tmp_path))


def test_a_file_is_answered_with_its_folder(llama_dir):
    with pytest.raises(ConfigError, match=f"Name the folder it is in: model.name_or_path={llama_dir}"):
        local_path(str(llama_dir / "config.json"))


def test_damaged_weights_are_one_message(tmp_path):
    folder = save_tiny(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_policy(str(folder), tokenizer=tiny_tokenizer())


def test_a_hub_that_is_switched_off_is_told_as_such():
    with pytest.raises(ConfigError, match=r"nobody/nothing cannot be loaded.*HF_HUB_OFFLINE"):
        load_policy("nobody/nothing", tokenizer=tiny_tokenizer())


def silent_hub(code, tmp_path, **environment):
    """Run code in a process of its own whose hub is a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {k: v for k, v in os.environ.items() if k not in {"HF_HUB_OFFLINE", *hub.PROXIES}}
    clean |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path), **environment}
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=root, capture_output=True, text=True, timeout=60, check=False
    )


ENSURE = """
import time
from runner.hub import ensure_available
import huggingface_hub.constants
start = time.monotonic()
try:
    ensure_available("some/model", key="model.name_or_path")
except Exception as error:
    print(type(error).__name__, error)
print("seconds", time.monotonic() - start)
print("offline", huggingface_hub.constants.is_offline_mode())
"""


def test_a_hub_that_does_not_answer_costs_seconds_not_a_minute(tmp_path):
    said = silent_hub(ENSURE, tmp_path).stdout
    assert "ConfigError model.name_or_path=some/model cannot be loaded" in said
    assert "does not answer" in said
    assert float(said.split("seconds ")[1].split()[0]) < 5


LOAD = """
import time, logging
from runner.models import load_policy, load_tokenizer
logging.basicConfig()
start = time.monotonic()
tokenizer = load_tokenizer("some/model")
print(type(load_policy("some/model", tokenizer=tokenizer)).__name__)
print("seconds", time.monotonic() - start)
"""


def test_a_cached_model_is_used_when_the_hub_does_not_answer(tmp_path):
    repository = tmp_path / "hub" / "models--some--model"
    save_tiny(repository / "snapshots" / "abc", "neox")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    found = silent_hub(LOAD, tmp_path)
    assert "does not answer: some/model comes from the cache" in found.stderr
    assert found.stdout.split()[0] == "GPTNeoXForCausalLM"
    assert float(found.stdout.split()[2]) < 20  # the libraries alone would retry for a minute


def test_behind_a_proxy_the_hub_is_not_probed(tmp_path):
    said = silent_hub(ENSURE, tmp_path, HTTPS_PROXY="http://127.0.0.1:9").stdout
    assert "ConfigError" not in said
    assert "offline False" in said


def test_the_digest_of_weights_is_the_same_whether_it_is_known_or_read(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    built = embedded.build_once("x", lambda folder: (folder / "model.safetensors").write_bytes(b"one"))
    plain = tmp_path / "plain"
    shutil.copytree(built, plain)
    (plain / embedded.RECORD).unlink()
    digest = digest_weights(plain)
    assert digest_weights(built) == digest
    blob = tmp_path / "hub" / "blobs" / hashlib.sha256(b"one").hexdigest()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"other")  # its name is believed
    (tmp_path / "hub" / "model.safetensors").symlink_to(blob)
    assert digest_weights(tmp_path / "hub") == digest
    (built / "model.safetensors").write_bytes(b"two")
    assert digest_weights(built) not in (None, digest)


def test_the_weights_of_a_model_from_the_hub_are_in_its_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert folder_of("some/model", None) == folder_of("some/model", "abc") == snapshot
    assert folder_of(str(tmp_path), None) == tmp_path
