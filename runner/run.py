"""One experiment, top to bottom: what a run directory's ``config.yaml`` says is trained, evaluated and saved there.

``python -m runner.run RUN_DIR`` is one rank of a run in several processes; ``runner.launch`` starts them.
"""

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runner import (
    card,
    checkpoints,
    console,
    data,
    estimate,
    findings,
    foresight,
    hardware,
    launch,
    lean,
    manifest,
    models,
    preemption,
    prepared,
    pruning,
    report,
    tokens,
    trainers,
    views,
)
from runner.config import given, trainer_name
from runner.errors import ConfigError, RunPreempted, RunPruned, RunStopped

logger = logging.getLogger(__name__)


def run(run_dir: Path) -> dict[str, float]:
    """Run the experiment of a run directory and return its metrics.

    All that it reads of the person's wishes is ``config.yaml`` in the directory; all that it makes is written to the
    directory, whose manifest says how the run ended, whatever happens. Where the directory has a complete checkpoint,
    the run goes on from it.

    Raises:
        ConfigError: The config, the data or the model cannot give this run.
        RunStopped: A guard ended it.
        RunPreempted, RunPruned: It was told to end.
    """
    run_dir = Path(run_dir).absolute()
    config: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    heeding = preemption.heeding(config.get("max_seconds"))
    with manifest.recording(run_dir), checkpoints.fitting(run_dir), heeding as stopping:
        resumed = checkpoints.find_newest(run_dir)
        name = trainer_name(config["trainer"]["_target_"])
        reads = views.row_kind(name)
        loaded = data.load_splits(reads=reads, run_seed=config["seed"], **config["dataset"])
        manifest.update(run_dir, data=loaded.report, seed=config["seed"])

        tokenizer = models.load_tokenizer(**given(models.load_tokenizer, config["model"]))
        limits = {
            "max_length": config["trainer"].get("max_length") or config["trainer"].get("max_prompt_length"),
            "too_long": config["dataset"].get("too_long", "drop"),
        }
        rows, audit = tokens.fit_splits(loaded, tokenizer, reads=reads, trainer=name, **limits)
        online = reads == "prompt"
        columns = set(rows.train.column_names) if online else {key for row in rows.held_out for key in row}
        arguments, chosen = trainers.build_arguments(  # and with them the group of processes, before any model
            config["trainer"], run_dir, evaluates=rows.eval is not None, resumed=resumed is not None,
            global_batch_size=config.get("global_batch_size"), launch=config.get("launch"), rows=len(rows.train),
        )  # fmt: skip
        trainers.refuse(arguments, prompts=len(rows.train), adapted=bool(config["peft"]))
        scoring = trainers.load_rewards(config, columns=columns, online=online)
        facts = {"chosen": chosen, "untrained_rewards": scoring.untrained}
        facts |= foresee(config, name, loaded, audit, arguments, tokenizer)
        manifest.update(run_dir, **facts, processes=arguments.world_size, hardware=hardware.describe())

        model, adapter = trainers.load_model(name, tokenizer, config, arguments)
        train, held_out = prepared.choose_rows(rows, arguments, trainer=name)
        trainer = trainers.build_trainer(
            config, model=model, adapter=adapter, arguments=arguments, tokenizer=tokenizer, train=train,
            held_out=held_out, scoring=scoring, run_dir=run_dir,
        )  # fmt: skip
        trainers.add_samples(trainer, rows.held_out, scoring, run_dir, **config["samples"])
        del loaded, rows  # the text of rows that are trained on as token ids
        manifest.update(run_dir, **trainers.describe(trainer, config["model"].get("revision")))

        checkpoints.Checkpoints(trainer, run_dir, keep=config["trainer"].get("save_total_limit"), resumed=resumed)
        with pruning.reporting(trainer, run_dir):
            metrics = trainers.train(trainer, stopping, resumed=resumed)
        trainers.save(trainer, run_dir / "model")
        metrics |= trainers.evaluate(trainer)
        facts = {"metrics": metrics, "speed": trainers.speed(trainer, metrics)}
        manifest.update(run_dir, **facts, result_sha256=models.digest_weights(run_dir / "model"))
    if manifest.rank() == 0:
        publish(run_dir, trainer)
    return metrics


def foresee(
    config: dict[str, Any], name: str, loaded: data.Splits, audit: dict[str, Any], arguments: Any, tokenizer: Any
) -> dict[str, Any]:
    """Return what ``python -m runner.check`` says of the rows, and how long and how large it expects the run to be."""
    limit = getattr(arguments, "max_length", None) or getattr(arguments, "max_prompt_length", None)
    found = [*findings.of_splits(loaded), *findings.of_tokens(audit, trainer=name, max_length=limit)]
    plan = estimate.plan_run(name, arguments, audit=audit["train"], evaluates=loaded.eval is not None)
    facts = {"tokens": audit, "findings": [asdict(one) for one in found], "plan": asdict(plan)}
    about = {"trainer": name, "arguments": arguments, "audit": audit["train"]}
    try:
        counted = foresight.count_models(config, tokenizer=tokenizer, **about)
        answered = {"samples": config["samples"], "held_out": len(loaded.held_out)}
        answered["launch"] = config.get("launch") or {}
        facts["memory"], _ = foresight.foresee_memory(counted, **answered, **about)
    except Exception as error:  # noqa: BLE001  what cannot be foreseen may still be done
        logger.warning("The memory cannot be foreseen: %s", error)
    return facts


def publish(run_dir: Path, trainer: Any) -> None:
    """Write card, curves and report, push if asked to, end what tracks, log the summary; none can undo the run."""
    steps = {
        "card": lambda: card.write_card(run_dir),
        "curves": lambda: report.write_curves(run_dir),
        "report": lambda: report.write_page(run_dir),
        "push": lambda: trainers.push(trainer, run_dir),
        "wandb": lambda: (opened := getattr(sys.modules.get("wandb"), "run", None)) and opened.finish(),
    }
    for name, step in steps.items():
        try:
            step()
        except Exception as error:  # noqa: BLE001  the run is saved; what fails after it is logged and recorded
            logger.warning("The %s failed: %s", name, error)
            manifest.update(run_dir, after={name: f"{type(error).__name__}: {error}"})
    logger.info("%s", report.summary(run_dir))


def main() -> None:
    """Be a rank."""
    lean.settle()
    run_dir, code = Path(sys.argv[1]), 0
    console.set_up_logs(run_dir if manifest.rank() == 0 else None)
    console.quieten()
    launch.register(run_dir)
    try:
        run(run_dir)
    except RunPreempted as error:
        code = error.code
    except RunPruned as error:
        logger.info("%s", error)
    except (ConfigError, RunStopped) as error:
        logger.error("%s", error)
        code = console.exit_code(error)
    logging.shutdown()
    os._exit(code)  # ranks over gloo may hang when the interpreter ends


if __name__ == "__main__":
    main()
