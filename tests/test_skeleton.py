"""A model on the meta device keeps what the real one would."""

import json
from types import SimpleNamespace

import pytest
from peft import LoraConfig
from tiny import tiny_tokenizer

from runner import skeleton

PRECISION = SimpleNamespace(bf16=False, fp16=False, use_cpu=True)


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
