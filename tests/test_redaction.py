import logging

import pytest

from runner.redaction import HIDDEN, Scrubbing, scrub


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "swordfish-1")
    monkeypatch.setenv("WANDB_API_KEY", "marmalade")
    monkeypatch.setenv("DB_PASSWORD", "123456")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "swordfish-2")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("sent swordfish-1 and marmalade and 123456", f"sent {HIDDEN} and {HIDDEN} and {HIDDEN}"),
        ("from hf_abcdefghijklmnopqrst here", f"from {HIDDEN} here"),
        ("trainer.hub_token=abc trainer.beta=0.1", f"trainer.hub_token={HIDDEN} trainer.beta=0.1"),
        ("+a.password='x y' b", f"+a.password='{HIDDEN}' b"),
        ('{"api_key": "abc", "n": 1}', f'{{"api_key": "{HIDDEN}", "n": 1}}'),
        ("hub_token: abc\nbeta: 1", f"hub_token: {HIDDEN}\nbeta: 1"),
        ("OPENAI_KEY=abc", f"OPENAI_KEY={HIDDEN}"),
        ("https://me:pw@host/x?token=abc&n=1", f"https://{HIDDEN}@host/x?token={HIDDEN}&n=1"),
        ("s3://bucket/x?X-Amz-Signature=abc", f"s3://bucket/x?X-Amz-Signature={HIDDEN}"),
        ("Authorization: Bearer abcdefghij", f"Authorization: Bearer {HIDDEN}"),
        ("/very/long/" + "x" * 100 + "/token=abc", "/very/long/" + "x" * 100 + f"/token={HIDDEN}"),
    ],
)
def test_secrets_leave_a_text(text, clean):
    assert scrub(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "model.pad_token=<|endoftext|> trainer.eos_token=stop image_token: img",
        "max_tokens=100 token_id: 5 tokenizer=bpe n_tokens=3",
        "def f(token: str | None = None, key: int = 0)",
        "hf_transfer hf_hub_download swordfish-2 https://host/x?n=1 user@host",
        "dataset.path=data/hf_ultrachat200k.jsonl output_dir=outputs/hf_smollm2instruct",
        "answer_token=#### loss_per_token=0.25 hub_token=null api_key: ${oc.env:KEY}",
    ],
)
def test_what_is_no_secret_stays(text):
    assert scrub(text) == text


def test_secrets_leave_a_tree_and_the_rest_keeps_its_types():
    tree = {"hub_token": "a", "password": 5, "pad_token": "p", "sizes": [1, 2.5, None], "n": {"api_key": None}}
    clean = {"hub_token": HIDDEN, "password": HIDDEN, "pad_token": "p", "sizes": [1, 2.5, None], "n": {"api_key": None}}
    assert scrub(tree) == clean


def test_secrets_leave_a_command_line_up_to_the_end_of_the_argument():
    argv = ["run.py", "trainer.hub_token=a b c", "--password", "d e", "--epochs", "3"]
    assert scrub(argv) == ["run.py", f"trainer.hub_token={HIDDEN}", "--password", HIDDEN, "--epochs", "3"]


def test_a_variable_that_names_a_key_file_hides_no_path(monkeypatch, tmp_path):
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    assert scrub(f"reading {tmp_path}") == f"reading {tmp_path}"


def test_no_secret_reaches_a_log_file(tmp_path):
    handler = logging.FileHandler(tmp_path / "log")
    handler.addFilter(Scrubbing())
    log = logging.Logger("test")
    log.addHandler(handler)
    try:
        raise ValueError("login with swordfish-1 failed")
    except ValueError:
        log.exception("token %s, %d tries", "swordfish-1", 3)
    handler.close()
    text = (tmp_path / "log").read_text()
    assert "swordfish" not in text
    assert f"token {HIDDEN}, 3 tries" in text
    assert f"ValueError: login with {HIDDEN} failed" in text
