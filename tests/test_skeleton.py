"""A model on the meta device keeps what the real one would."""

import json
from types import SimpleNamespace

import pytest
from peft import LoraConfig
from tiny import tiny_tokenizer

from runner import skeleton

PRECISION = SimpleNamespace(bf16=False, fp16=False, use_cpu=True)


def test_a_model_is_counted_once_for_all_who_ask_the_same(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))

    def counted(r, **other):
        adapter = LoraConfig(r=r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        shape = {"sequences": 3, "length": 7, "quantization": None, "arguments": PRECISION} | other
        return skeleton.count({"name_or_path": str(llama_dir)}, tokenizer=tiny_tokenizer(), adapter=adapter, **shape)

    first = counted(2)
    (kept,) = tmp_path.glob("counted-*")
    monkeypatch.setattr(skeleton, "build", lambda *_, **__: pytest.fail("it was built again"))
    assert counted(2) == first
    for other in ({"r": 4}, {"r": 2, "length": 8}, {"r": 2, "alike": (0,)}):
        with pytest.raises(pytest.fail.Exception):
            counted(**other)
    monkeypatch.undo()
    kept.write_bytes(b"damaged")
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    assert counted(2) == first
    assert counted(4).trainable == 2 * first.trainable


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_the_output_layer_too_and_what_trains_whole_are_counted(tied, llama_dir, tmp_path):
    config = json.loads((llama_dir / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def counted(**options):
        model = skeleton.build({"name_or_path": str(tmp_path)}, tokenizer=tiny_tokenizer(), **options)
        return skeleton.measure(model, sequences=3, length=7, quantization=None, arguments=PRECISION)

    whole, embedding = counted(), config["vocab_size"] * config["hidden_size"]
    assert (whole.head, whole.tied) == (embedding, embedding * tied)
    frozen = counted(dtype="bfloat16").weights
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    kept = counted(dtype="bfloat16", adapter=config)
    assert kept.weights == frozen + 4 * kept.trainable  # the copy that trains is float32


@pytest.mark.parametrize("kind", ["llama", "neox"])
@pytest.mark.parametrize("adapted", [False, True])
def test_layers_that_are_alike_hold_what_they_hold_together(kind, adapted, request, tmp_path, monkeypatch):
    config = json.loads((request.getfixturevalue(f"{kind}_dir") / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "layer_types"} | {"num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def measured():
        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if adapted else None
        model = skeleton.build({"name_or_path": str(tmp_path)}, tokenizer=tiny_tokenizer(), adapter=adapter)
        return skeleton.measure(model, sequences=3, length=7, quantization=None, arguments=PRECISION)

    found = measured()
    monkeypatch.setattr(skeleton, "_alike", lambda *_: False)  # all five are run
    assert found.kept == pytest.approx(measured().kept)
