"""A composed config: every key and type checked, all faults at once; and the only call to ``instantiate``."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from runner import engines, formats, schema, trainer_source, views
from runner.errors import ConfigError
from runner.redaction import scrub

CONF = Path(__file__).resolve().parent.parent / "conf"

# The groups whose option is an upstream dataclass, and the base class that makes a class one of them.
UPSTREAM = {"trainer": "TrainingArguments", "peft": "PeftConfig", "quantization": "QuantizationConfigMixin"}
TARGET = re.compile(r"(trl|peft|transformers|runner)(\.[a-z_0-9]+)*\.[A-Z]\w*Config")

# Fields that the runner itself fills: setting them would be without effect or break the run directory.
OWNED = {
    "trainer.output_dir": "output_dir=... at the top level",
    "trainer.model_init_kwargs": "the keys of the model group, for example model.dtype=bfloat16",
    "trainer.trust_remote_code": "model.trust_remote_code=true",
    "trainer.chat_template_path": "model.chat_template=...",
    "trainer.pad_token": "model.pad_token=...",
    "trainer.reward_weights": "reward.terms.<name>.weight=...",
    "trainer.resume_from_checkpoint": "resume=<run directory>",
    "trainer.do_train": "nothing: a run trains",
    "trainer.do_eval": "dataset.eval=null for no evaluation",
    "trainer.do_predict": "samples.rows=...",
    "trainer.fsdp": "launch=fsdp2",
    "trainer.fsdp_config": "launch=fsdp2 launch.fsdp.<field>",
    "trainer.deepspeed": "launch=zero2 or launch=zero3, and launch.deepspeed.<field>",
    "launch.deepspeed.gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "launch.deepspeed.gradient_clipping": "trainer.max_grad_norm",
    "trainer.hub_token": "the environment variable HF_TOKEN: a config is written to disk",
    "peft.task_type": "nothing: it follows from the trainer",
    "peft.base_model_name_or_path": "model.name_or_path=...",
}
# Names that upstream or other tools use, and where the key lives now.
RENAMED = {
    "evaluation_strategy": "trainer.eval_strategy",
    "lr": "trainer.learning_rate",
    "epochs": "trainer.num_train_epochs",
    "num_epochs": "trainer.num_train_epochs",
    "batch_size": "trainer.per_device_train_batch_size",
    "per_device_batch_size": "trainer.per_device_train_batch_size",
    "max_seq_length": "trainer.max_length",
    "max_new_tokens": "trainer.max_completion_length",
    "response_length": "trainer.max_completion_length",
    "warmup_ratio": "trainer.warmup_steps (a value below 1 is a ratio of all steps)",
    "group_by_length": "trainer.train_sampling_strategy=group_by_length",
    "no_cuda": "trainer.use_cpu",
    "per_gpu_train_batch_size": "trainer.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "trainer.per_device_eval_batch_size",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "nothing: a run directory is never overwritten",
    "push_to_hub_model_id": "trainer.hub_model_id",
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name_or_path",
    "dataset_name": "dataset.path",
    "load_in_4bit": "quantization=nf4",
    "load_in_8bit": "quantization=int8",
    "lora_r": "peft.r",
    "rank": "peft.r",
    "alpha": "peft.lora_alpha",
    "lora_target_modules": "peft.target_modules",
    "use_peft": "peft=lora",
}


def find_faults(config: dict[str, Any], choices: dict[str, str]) -> list[str]:
    """Return every unknown key, wrong type, missing value and secret of a resolved config, one sentence each.

    Args:
        config: The resolved config, without Hydra's own node.
        choices: The chosen option of each group, for the messages.
    """
    faults = find_secrets(config)
    known = schema.own_fields(schema.Root)
    left_out = {group for group in schema.OPTIONAL if not isinstance(config.get(group), dict)}
    groups = {*schema.GROUPS, *UPSTREAM} - left_out
    values = {group for group in groups if not isinstance(config.get(group), dict)}
    for group in sorted(groups):
        node: Any = config.get(group)
        if group in values:
            faults.append(f"{group} must be a group of keys, found {node!r}. Choose one: {group}=...")
            continue
        try:
            known |= {f"{group}.{key}": field for key, field in _group_fields(group, node).items()}
        except ConfigError as error:
            faults.append(str(error))
    for path, value in _leaves({key: node for key, node in config.items() if key not in values}, groups, known):
        if path in OWNED and value is not None:
            faults.append(f"{path} is set by the runner. Use {OWNED[path]}.")
        elif path in known:
            faults += _value_faults(path, value, known[path])
        elif (group := path.split(".")[0]) in UPSTREAM and "_target_" not in (config.get(group) or {}):
            faults.append(f"{path} has no effect with {group}=none. Choose {_options(group)}.")
        else:
            faults.append(_unknown(path, known, config, choices))
    return faults or _conflicts(config, choices)


def _conflicts(config: dict[str, Any], choices: dict[str, str]) -> list[str]:
    """Return the choices that exclude each other, as far as they can be known before anything is read."""
    found = []
    if config["quantization"] and not config["peft"]:
        found.append(
            f"quantization={choices.get('quantization', '?')} cannot train without an adapter: quantized weights "
            f"stay frozen, found peft=none. Choose {_options('peft')}, or quantization=none."
        )
    found += engines.find_conflicts(config) + trainer_source.find_unknown(config["trainer"])
    node, size = config.get("launch") or {}, config.get("global_batch_size")
    each, nodes = node.get("processes", 1), node.get("nodes", 1)
    processes = each * nodes if isinstance(each, int) and isinstance(nodes, int) else None
    if size and processes and not accumulation(size, config["trainer"], processes):
        found.append(
            f"global_batch_size={size} cannot be made by {processes} processes with "
            f"trainer.per_device_train_batch_size={config['trainer'].get('per_device_train_batch_size', 8)}: choose "
            "another."
        )
    expect = config.get("expect") or {}
    if config.get("check_expected") and not expect:
        found.append("check_expected=true needs something to expect: choose a recipe that has it, with experiment=...")
    found += [
        f"expect.{name} takes the lowest and the highest value, found {bounds}."
        for name, bounds in expect.items()
        if len(bounds) != 2 or bounds[0] > bounds[1]
    ]
    dataset = config["dataset"]
    if not any(dataset.get(key) for key in ("path", "generator", "sources")):
        found.append(f"dataset.path must be given with dataset={choices.get('dataset', '?')}: type dataset.path=...")
    if not dataset.get("sources"):
        found += [
            f"dataset.{key} has no effect without dataset.sources: leave it out, or choose dataset=mix."
            for key in ("weight", "stopping_strategy")
            if key in dataset
        ]
        if config["trainer"].get("eval_strategy", "no") != "no" and not dataset.get("eval"):
            found.append(
                f"trainer.eval_strategy={config['trainer']['eval_strategy']} needs held-out rows, and dataset.eval is "
                "null: type dataset.eval=..., for example train[90%:], or trainer.eval_strategy=no."
            )
    name = trainer_name(config["trainer"]["_target_"])
    value_mode = config["trainer"].get("value_mode") or ("adapter" if config["peft"] else "separate")
    if config.get("value_model") and (name != "ppo" or value_mode != "separate"):
        found.append(
            f"value_model has no effect with trainer={choices.get('trainer', name)} and peft={choices.get('peft', '?')}"
            ": type trainer=ppo trainer.value_mode=separate, or leave it out."
        )
    if dataset.get("format", "auto") != "auto" and not dataset.get("generator"):
        try:
            columns = formats.produces(dataset["format"])
            views.refuse_unreadable(
                views.row_kind(name), columns, dataset=choices.get("dataset", "?"), trainer=choices.get("trainer", name)
            )
        except ConfigError as error:
            found.append(str(error))
    return found


def find_secrets(tree: dict[str, Any]) -> list[str]:
    """Return a sentence on the keys whose values look like secrets, if any do: all that is typed is written to disk."""
    keys = ", ".join(scrub(list(changes(tree, scrub(tree)))))
    return [f"{keys} holds what looks like a secret, and is written to disk: use the environment."] if keys else []


def accumulation(global_batch_size: int, trainer: dict[str, Any], processes: int) -> int | None:
    """Return the micro-batches that make an optimizer step of so many sequences; None where none do."""
    steps, left = divmod(global_batch_size, trainer.get("per_device_train_batch_size", 8) * processes)
    return steps if steps and not left else None


# Keys, what the others must be for them to have no effect, and how to say so. ``t`` is the trainer's node.
IDLE: list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], bool], str]] = [
    ("trainer.max_steps", lambda t, c: t.get("max_steps") == 0, "0 is as -1: epochs tell the length"),
    ("trainer.num_train_epochs", lambda t, c: t.get("max_steps", -1) > 0, "trainer.max_steps is set"),
    ("trainer.num_train_epochs", lambda t, c: bool(t.get("total_episodes")), "trainer.total_episodes is set"),
    ("trainer.total_episodes", lambda t, c: t.get("max_steps", -1) > 0, "trainer.max_steps is set"),
    ("trainer.eval_steps", lambda t, c: t.get("eval_strategy", "no") != "steps", "trainer.eval_strategy is not steps"),
    ("trainer.eval_delay", lambda t, c: t.get("eval_strategy", "no") == "no", "trainer.eval_strategy is no"),
    ("trainer.save_steps", lambda t, c: t.get("save_strategy", "steps") != "steps", "save_strategy is not steps"),
    ("trainer.save_total_limit", lambda t, c: t.get("save_strategy") == "no", "trainer.save_strategy is no"),
    ("trainer.logging_steps", lambda t, c: t.get("logging_strategy", "steps") != "steps", "logging_strategy not steps"),
    ("trainer.warmup_steps", lambda t, c: t.get("lr_scheduler_type", "linear") == "constant",
     "trainer.lr_scheduler_type=constant has no warm-up: constant_with_warmup has"),
    ("trainer.per_device_eval_batch_size trainer.eval_on_start trainer.num_generations_eval samples.rows "
     "samples.max_new_tokens samples.batch_size", lambda t, c: _evaluates_nothing(c), "dataset.eval is null"),
    ("samples.max_new_tokens samples.batch_size", lambda t, c: c["samples"].get("rows") == 0, "samples.rows is 0"),
    ("samples.rows samples.max_new_tokens samples.batch_size", lambda t, c: t["_target_"].endswith("RewardConfig"),
     "a reward model writes no answers"),
    ("trainer.hub_model_id trainer.hub_strategy trainer.hub_revision",
     lambda t, c: not t.get("push_to_hub"), "trainer.push_to_hub is not set"),
    ("trainer.train_sampling_strategy", lambda t, c: views.row_kind(trainer_name(t["_target_"])) == "prompt",
     "this trainer has an order of its own"),
    ("trainer.train_sampling_strategy", lambda t, c: bool(t.get("packing")), "packed rows have one length"),
    ("trainer.packing_strategy", lambda t, c: not t.get("packing"), "trainer.packing is not set"),
    ("share_prefixes", lambda t, c: trainer_name(t["_target_"]) == "ppo", "PPO reads each row alone"),
    ("trainer.gradient_checkpointing_kwargs", lambda t, c: t.get("gradient_checkpointing") is False,
     "trainer.gradient_checkpointing is false"),
    ("trainer.ref_model_mixup_alpha trainer.ref_model_sync_steps", lambda t, c: not t.get("sync_ref_model"),
     "trainer.sync_ref_model is not set"),
    ("trainer.precompute_ref_batch_size", lambda t, c: t.get("precompute_ref_log_probs") is False,
     "trainer.precompute_ref_log_probs is false"),
    ("trainer.kl_estimator", lambda t, c: t.get("kl_coef", 0.05) == 0, "trainer.kl_coef is 0"),
    ("trainer.kl_horizon", lambda t, c: t.get("target_kl") is None, "trainer.target_kl is null"),
    ("trainer.metric_for_best_model trainer.greater_is_better", lambda t, c: not t.get("load_best_model_at_end")
     and t.get("save_strategy") != "best" and t.get("lr_scheduler_type") not in ("reduce_lr_on_plateau", "greedy"),
     "trainer.load_best_model_at_end is not set"),
    ("quantization.bnb_4bit_quant_type quantization.bnb_4bit_use_double_quant quantization.bnb_4bit_compute_dtype",
     lambda t, c: bool(c["quantization"]) and not c["quantization"].get("load_in_4bit"), "the weights get 8 bits"),
    ("peft.lora_dropout", lambda t, c: t["_target_"].endswith("PPOConfig"), "PPO trains without dropout"),
    ("dataset.name dataset.revision", lambda t, c: Path(str(c["dataset"].get("path"))).expanduser().exists(),
     "dataset.path is local"),
    ("launch.node_rank launch.rendezvous", lambda t, c: (c.get("launch") or {}).get("nodes", 1) == 1,
     "launch.nodes is 1"),
    ("model.revision", lambda t, c: Path(c["model"]["name_or_path"]).expanduser().is_dir(), "the model is local"),
]  # fmt: skip


def find_idle(config: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """Return those of the keys that a person set which the others leave without effect, a sentence each.

    Args:
        config: Without faults.
        keys: Dotted.
    """
    trainer, touched = config["trainer"], set(keys)
    found = [
        f"{key} has no effect: {reason}."
        for names, is_idle, reason in IDLE
        for key in names.split()
        if key in touched and is_idle(trainer, config)
    ]
    vllm = [key for key in touched if key.startswith("trainer.vllm_") and not trainer.get("use_vllm")]
    return found + [f"{key} has no effect: trainer.use_vllm is not set." for key in sorted(vllm)]


def _evaluates_nothing(config: dict[str, Any]) -> bool:
    dataset = config["dataset"]
    return not dataset.get("eval") and not any((s or {}).get("eval") for s in (dataset.get("sources") or {}).values())


def build(node: dict[str, Any], *, class_fields: dict[str, Any] | None = None, **fields: Any) -> Any:
    """Make the object that an upstream config node names; the node's values give way to ``fields``.

    Args:
        node: The config node.
        class_fields: What the class would find out from its surroundings, and is to take as given.
        fields: Values.

    Raises:
        ConfigError: The class is not one that a config may name, or it refuses its values.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    target = str(node.get("_target_"))
    if not TARGET.fullmatch(target):
        raise ConfigError(f"_target_={target!r} is not a config class of trl, peft, transformers or runner.")
    try:
        made = instantiate({**node, **fields}, _convert_="all", _recursive_=False, _partial_=bool(class_fields))
        return type(made.func.__name__, (made.func,), class_fields)(**made.keywords) if class_fields else made
    except (InstantiationException, ValueError) as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{target.rsplit('.', 1)[-1]} refuses its values: {cause}") from error


def given(function: Callable[..., Any], node: dict[str, Any]) -> dict[str, Any]:
    """Return those keys of a node that a function takes."""
    return {key: node[key] for key in inspect.signature(function).parameters if key in node}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted path."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def changes(old: dict[str, Any], new: dict[str, Any], missing: Any = None) -> dict[str, list[Any]]:
    """Return the leaves in which two trees differ, by dotted path, each with both values, or what stands for none."""
    one, other = flat(old), flat(new)
    pairs = {key: [one.get(key, missing), other.get(key, missing)] for key in sorted(one | other)}
    return {key: pair for key, pair in pairs.items() if pair[0] is not pair[1] and pair[0] != pair[1]}


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a leaf of nested dicts by its dotted path, or raise ConfigError where a part of it is no group of keys."""
    *parents, last = path.split(".")
    for parent in parents:
        tree[parent] = tree = {} if tree.get(parent) is None else tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} does not exist: {parent} is {tree!r}, and has no keys.")
    tree[last] = value


def trainer_name(target: str) -> str:
    """Return a trainer's short name: ``trl.DPOConfig`` gives ``dpo``."""
    return target.rsplit(".", 1)[-1].removesuffix("Config").lower()


def _group_fields(group: str, node: dict[str, Any]) -> dict[str, schema.Field]:
    """Return the fields that a group's node may have, nested nodes of our own groups included."""
    if group in UPSTREAM:
        return _upstream_fields(group, node)
    known = schema.own_fields(schema.GROUPS[group])
    if group == "launch":
        plugins = {name: target for name, target in engines.PLUGINS.items() if isinstance(node.get(name), dict)}
        inner = {n: schema.upstream_fields(target) for n, target in plugins.items()}
        return known | {f"{name}.{key}": field for name, keys in inner.items() for key, field in keys.items()}
    if group not in ("dataset", "reward"):
        return known
    nested, function, module = (
        ("sources", "generator", "arithmetic") if group == "dataset" else ("terms", "function", "rewards")
    )
    name = node.get(function)
    if isinstance(name, str) and "." not in name:
        known |= schema.keyword_fields(module, name)
    elif isinstance(name, str):  # a person's own function: its keywords are checked when it is called
        known |= {key: schema.Field(lambda: (Any, "any value")) for key in node if key not in known}
    if group == "reward" and isinstance(node.get("model"), dict):
        known |= {f"model.{key}": field for key, field in schema.own_fields(schema.Model).items()}
    for name, child in (children if isinstance(children := node.get(nested), dict) else {}).items():
        if isinstance(child, dict):
            known |= {f"{nested}.{name}.{key}": field for key, field in _group_fields(group, child).items()}
    return known


def _upstream_fields(group: str, node: dict[str, Any]) -> dict[str, schema.Field]:
    target = node.get("_target_")
    if target is None:
        if group == "trainer":
            raise ConfigError(
                "trainer has no _target_: name a config class such as trl.SFTConfig, or choose trainer=sft."
            )
        return {}
    if not isinstance(target, str) or not TARGET.fullmatch(target):
        raise ConfigError(
            f"{group}._target_={target!r} is refused: only config classes of trl, peft, transformers or runner."
        )
    if UPSTREAM[group] not in schema.bases_of(target):
        raise ConfigError(f"{group}._target_={target} is refused: it is not a {UPSTREAM[group]}.")
    return schema.upstream_fields(target)


def _leaves(config: dict[str, Any], groups: set[str], known: dict[str, schema.Field]) -> list[tuple[str, Any]]:
    """List (path, value) of everything that is a key of ours or upstream's; a known key's value is one leaf."""
    found: list[tuple[str, Any]] = []

    def walk(path: str, node: Any) -> None:
        inside = [key for key in known if key.startswith(path + ".")]
        if isinstance(node, dict) and (path in groups or inside):
            for key, value in node.items():
                if key != "_target_":
                    walk(f"{path}.{key}", value)
        else:
            found.append((path, node))

    for key, value in config.items():
        walk(str(key), value)
    present = dict(found)
    nodes = {path.rsplit(".", 1)[0] for path in present}
    lacking = [path for path, field in known.items() if field.required and path.rsplit(".", 1)[0] in nodes]
    return found + [(path, "???") for path in lacking if path not in present]


def _value_faults(path: str, value: Any, field: schema.Field) -> list[str]:
    """Check one value against its field's type; upstream's ``float`` also takes a whole number."""
    if value == "???":
        return [f"{path} must be given ({field.text}): type {path}=..."]
    if not field.takes(value):
        hint = f"""; quote it: {path}="'{value}'" """.rstrip() if "str" in field.text and isinstance(value, int) else ""
        return [f"{path} takes {field.text}, found {value!r} ({type(value).__name__}){hint}."]
    low = isinstance(value, int | float) and value < schema.LEAST.get(path, value)
    return [f"{path}={value} must be at least {schema.LEAST[path]}."] if low else []


def _unknown(path: str, known: dict[str, schema.Field], config: dict[str, Any], choices: dict[str, str]) -> str:
    """Say that a key does not exist, with the nearest path that does and the group it lives in."""
    group, _, _ = path.partition(".")
    name = path.rsplit(".", 1)[-1]
    target = (config.get(group) or {}).get("_target_") if isinstance(config.get(group), dict) else None
    where = f"{target} ({group}={choices.get(group, '?')})" if target else (f"group {group}" if "." in path else "")
    text = f"{path} does not exist" + (f" in {where}" if where else "")
    if name in RENAMED:
        return f"{text}: use {RENAMED[name]}."
    others = _other_options(group, choices)
    if having := [option for option, names in others.items() if name in names]:
        return f"{text}: {', '.join(f'{group}={o}' for o in having)} would have it."
    parent = path.rpartition(".")[0]
    siblings = {key.rsplit(".", 1)[-1]: key for key in known if key.rpartition(".")[0] == parent}
    begun = [key for sibling, key in siblings.items() if sibling.startswith(f"{name}_")]
    same = [key for key in known if key.rsplit(".", 1)[-1] == name]
    if "." not in path and not same and (near := difflib.get_close_matches(name, [*group_names(), *known], 1, 0.6)):
        return f"{text}: did you mean {near[0]}=...?"
    near = begun if len(begun) == 1 else same or _nearest(name, siblings)
    if not near and (far := _nearest(name, {n: n for names in others.values() for n in names}, 0.75)):
        having = [option for option, names in others.items() if far[0] in names]
        return f"{text}: did you mean {group}.{far[0]}, which {', '.join(f'{group}={o}' for o in having)} would have?"
    near = near or _nearest(name, {key.rsplit(".", 1)[-1]: key for key in reversed(list(known))})
    if near:
        return f"{text}: did you mean {near[0]} (group {near[0].partition('.')[0]})?"
    return f"{text}, and nothing has a similar name." + (f" It has {sorted(siblings)}." if len(siblings) < 30 else "")


def _nearest(name: str, paths: dict[str, str], cutoff: float = 0.6) -> list[str]:
    """Return the path whose name is nearest, or none."""
    return [paths[near] for near in difflib.get_close_matches(name, list(paths), 1, cutoff)]


@cache
def group_names() -> list[str]:
    """List the config groups."""
    return sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "hydra")


def option_names(group: str, folder: Path = CONF) -> list[str]:
    """List a group's options, without those that only serve others (``_base``)."""
    return sorted(p.stem for p in (folder / group).glob("*.yaml") if not p.stem.startswith("_"))


def option_targets(group: str) -> dict[str, str]:
    """Return the class that each option of an upstream group names."""
    texts = {option: (CONF / group / f"{option}.yaml").read_text("utf-8") for option in option_names(group)}
    found = {option: re.search(r"^_target_: (\S+)", text, re.MULTILINE) for option, text in texts.items()}
    return {option: target[1] for option, target in found.items() if target}


def _options(group: str) -> str:
    return " or ".join(f"{group}={o}" for o in option_names(group) if o != "none")


def _other_options(group: str, choices: dict[str, str]) -> dict[str, set[str]]:
    """Return the names of the fields of an upstream group's options, other than the chosen one."""
    found = {}
    for option, target in option_targets(group).items() if group in UPSTREAM else ():
        if option != choices.get(group):
            with suppress(ConfigError):  # an option that the installed library lacks is no suggestion
                found[option] = set(schema.upstream_fields(target))
    return found
