"""Train a recipe: one loop that reads downwards. Evaluate a model. What a recipe is stands in `recipe.py`."""
from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from bitspike.checkpoints import (
    RunError,
    build,
    checkpoint_folder,
    load_run,
    load_weights,
    open_run,
    read_state,
    resolved_spec,
    save_checkpoint,
    sole_trainer,
    start_from_run,
    start_run,
)
from bitspike.data import DataError, Dataset
from bitspike.data.pipeline import mix, seed_globals, seed_of
from bitspike.evaluation import as_input, evaluate, limited, load_for, normalise
from bitspike.layers import annealed_modules
from bitspike.models.published import PublishedWeightsError
from bitspike.objectives import (
    NonFinite,
    SpikeCounts,
    first_nonfinite,
    spike_costs,
    spike_penalty,
    with_logits_of,
)
from bitspike.optimizers import Average, learning_rate, make_optimizer
from bitspike.processes import share_, unshare_
from bitspike.progress import Reporter, duration
from bitspike.recipe import Recipe, RecipeError
from bitspike.spec import SpecError
from bitspike.tasks import Task, task_of
from bitspike.teachers import load_teacher
from bitspike.writing import write_text

__all__ = ["Interrupted", "NonFinite", "Recipe", "RecipeError", "RunError", "evaluate", "load_run", "normalise", "train"]


class Interrupted(SystemExit):
    """Raised after a signal, when the state has been saved; as an exit code 128 + the signal's number."""


def train(recipe: Recipe, data_dir: Dataset | Path | str | None, out_dir: Path | str, *,
          overrides: Mapping[str, str] | None = None, checkpoint_minutes: float = 5.0,
          log_seconds: float = 30.0) -> dict[str, Any]:
    """Train the recipe into the RUN folder `out_dir`, or go on with it; returns the last line of its metrics.

    data_dir: the folder that holds the dataset's folder (default: BITSPIKE_DATA), or a loaded dataset. overrides: text
    per field, applied to the recipe and recorded. Under `torchrun` every process takes its part of each batch.
    SIGINT and SIGTERM finish the step, save and raise `Interrupted`; after that, or after a kill at any moment, the same
    call goes on to the very same weights. A finished run is left as it is.
    Errors: RecipeError, RunError (the folder holds another run), DataError, SpecError, NonFinite.
    """
    recipe = recipe.override(overrides or {})
    run = Path(out_dir)
    accelerator = _accelerator(recipe)
    task = task_of(recipe)
    data = limited(data_dir, recipe) if isinstance(data_dir, Dataset) else load_for(recipe, data_dir)
    folder = open_run(run, recipe, data.hash)
    state: dict[str, Any] = read_state(folder) if folder else {"step": 0, "finished": False, "seconds": 0.0}
    if state["finished"]:
        last = read_metrics(run)[-1]
        Reporter(1, 1, 1, accelerator.is_main_process).say(
            f"{run} is finished: {state['step']} steps, test {task.says(last, 'test_')}. Nothing to do.")
        return last

    # the model, its average, what it is trained with
    model = _working_model(recipe, task, data).to(accelerator.device)
    if recipe.start and folder is None:
        start_from_run(model, recipe.start)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    spec = resolved_spec(model, recipe.quant_spec())
    average = Average(copy.deepcopy(model), recipe.ema) if recipe.ema else None
    batches = task.batches(recipe, data)
    task.meter(recipe, data, accelerator.device)  # a package it needs is missed now, not after the first epoch
    per_epoch = batches.steps_per_epoch
    if per_epoch < 1:
        raise DataError(f"{recipe.data}: {len(data.split(recipe.train_on))} training images are less than one batch of "
                        f"{recipe.batch_size}; set a smaller batch_size.")
    rank, world = accelerator.process_index, accelerator.num_processes
    pairs = 2 if recipe.mixup or recipe.cutmix else 1  # mixed with its neighbour
    if recipe.batch_size % (world * recipe.accumulate * pairs):
        neighbours = "2 (mixup and cutmix mix pairs of pictures) x " if pairs == 2 else ""
        raise RecipeError(f"recipe {recipe.name!r}, field batch_size={recipe.batch_size}: must be a multiple of {neighbours}"
                          f"accumulate={recipe.accumulate} x {world} processes.")
    steps = max(1, round(recipe.epochs * per_epoch))
    example = as_input(normalise(task.blank(recipe, data).to(accelerator.device), recipe))
    costs = spike_costs(model, example) if recipe.spike_penalty else {}
    optimizer = make_optimizer(model, recipe)
    if folder:
        load_weights(folder, "model", model)
        if average:
            load_weights(folder, "ema", average.model)
            average.updates = state["step"]
        stored = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(stored["optimizer"])
    objective = task.loss(recipe)
    if recipe.distill_logits:
        objective = with_logits_of(load_teacher(recipe, len(data.classes), accelerator.device), recipe, objective)
    if recipe.objective is not None:
        objective = recipe.objective(model, recipe, objective)
    counts = SpikeCounts(model) if recipe.spike_penalty else None
    bare, annealed = model, annealed_modules(model)
    if world > 1:
        share_(model, recipe.sync_norm)
    model, optimizer = accelerator.prepare(model, optimizer)
    if folder and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(stored["scaler"])
    unread: list[Tensor] = []  # losses of the last steps, still on the device
    epoch_loss, epoch_seconds, before = state.get("epoch_loss", 0.0), state.get("epoch_seconds", 0.0), state["seconds"]

    def save(step: int, finished: bool = False) -> None:
        if accelerator.is_main_process:
            weights = {"model": bare.state_dict(), **({"ema": average.model.state_dict()} if average else {})}
            tensors = {"optimizer": optimizer.state_dict()}
            if accelerator.scaler is not None:
                tensors["scaler"] = accelerator.scaler.state_dict()
            save_checkpoint(run, weights, spec, {
                "step": step, "steps": steps, "finished": finished, "seconds": before + time.monotonic() - started,
                "epoch_loss": epoch_loss, "epoch_seconds": epoch_seconds}, tensors)

    started = saved = time.monotonic()
    shown, on_cpu = average.model if average else bare, accelerator.device.type == "cpu"
    with (sole_trainer(run, accelerator.is_main_process), _exact(),
          Reporter(steps, state["step"], recipe.batch_size, accelerator.is_main_process, log_seconds) as report,
          _signals(report.say) as caught):
        if accelerator.is_main_process:
            if folder is None:  # only now, when nothing but the training itself can fail
                start_run(run, recipe, overrides or {}, data.hash)
            _cut_metrics(run, state["step"])
        for step in range(state["step"], steps):
            began = time.monotonic()
            epoch = step // per_epoch
            if step % per_epoch == 0 or step == state["step"]:
                model.train()
            for module in annealed:
                module.anneal(step / steps)
            rate = learning_rate(recipe, step, steps, per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]

            step_loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
            for part, (pixels, targets) in enumerate(batches.step(step, rank, world, recipe.accumulate)):
                images = normalise(pixels.to(accelerator.device), recipe)
                targets = task.to_device(targets, accelerator.device)
                if epoch < recipe.mixup_off_epoch or recipe.mixup_off_epoch == 0:
                    images, targets = mix(images, targets, len(data.classes), recipe.mixup, recipe.cutmix,
                                          (recipe.seed, "mix", step))
                images = as_input(images)
                # dropout and the like: exact from any step on, and the same for this part of the batch in any process
                seed_globals(seed_of(recipe.seed, step, 0, rank * recipe.accumulate + part))
                with accelerator.accumulate(model):
                    loss = objective(images, task.forward(model, images, targets), targets)
                    if counts:
                        loss = loss + recipe.spike_penalty * spike_penalty(counts.take(), costs)
                    if on_cpu and not bool(torch.isfinite(loss)):  # before it spoils the weights
                        raise _nonfinite(run, step, rate, bare, task, images, targets, accelerator)
                    step_loss += loss.detach() / recipe.accumulate
                    accelerator.backward(loss)
                    if recipe.grad_clip and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), recipe.grad_clip)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            if average:
                average.update(bare)
            unread.append(step_loss)
            done = step + 1
            epoch_ends = done % per_epoch == 0 or done == steps
            if not (on_cpu or epoch_ends or done % 20 == 0 or (caught.first and world == 1)):
                epoch_seconds += time.monotonic() - began
                continue  # reading a loss waits for the GPU

            losses = torch.stack(unread).tolist()
            unread.clear()
            bad = [done - len(losses) + i for i, value in enumerate(losses) if not math.isfinite(value)]
            if bad:
                raise _nonfinite(run, bad[0], rate, bare, task, images, targets, accelerator)
            epoch_loss += sum(losses)
            epoch_seconds += time.monotonic() - began
            if report.due():
                report.step(done, done / per_epoch, losses[-1], rate)
            if epoch_ends:
                in_epoch = done - epoch * per_epoch
                _end_of_epoch(recipe, task, data, run, shown, accelerator, report, {
                    "step": done, "epoch": round(done / per_epoch, 4), "lr": rate, "seconds": round(epoch_seconds, 1),
                    "loss": _mean(epoch_loss / in_epoch, accelerator),
                    "images_per_s": round(in_epoch * recipe.batch_size / epoch_seconds, 1)})
                epoch_loss = epoch_seconds = 0.0
            stop = _any(caught.first, accelerator)
            if stop or epoch_ends or time.monotonic() - saved > 60 * checkpoint_minutes:
                save(done)
                saved = time.monotonic()
            if stop and done < steps:
                report.say(f"{signal.Signals(stop).name}: saved after step {done} of {steps} in {run}. "
                           "The same command goes on from here.")
                raise Interrupted(128 + stop)

        # once, at the end
        if counts:
            counts.remove()
        with caught.at_once(f"the training is done and saved in {run}, its test is not. The same command takes it."):
            result = evaluate(shown, recipe, data, "test")
        final = {"final": True, "step": steps, "seconds": round(before + time.monotonic() - started, 1),
                 **{f"test_{k}": v for k, v in result.items()}}
        if accelerator.is_main_process:
            _append(run, final)
        save(steps, finished=True)
        accelerator.wait_for_everyone()
        report.say(f"test {task.says(final, 'test_')} of {final['test_n']} images, {duration(final['seconds'])}, in {run}")
    return final


# ------------------------------------------------------------------------------------------------- metrics
def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; a last line cut by a kill is left out."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _append(run: Path, row: Mapping[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _cut_metrics(run: Path, step: int) -> None:
    """Drop what was measured after the checkpoint: it will be measured again."""
    if (run / "metrics.jsonl").is_file():
        rows = [row for row in read_metrics(run) if row["step"] <= step and not row.get("final")]
        write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _end_of_epoch(recipe: Recipe, task: Task, data: Dataset, run: Path, model: nn.Module, accelerator: Accelerator,
                  report: Reporter, row: dict[str, Any]) -> None:
    text = f"epoch {row['epoch']:g}  loss {row['loss']:.4f}  {row['images_per_s']:.0f} images/s"
    if recipe.train_on == "train" and round(row["epoch"]) % recipe.validate_every == 0:
        row |= {f"val_{k}": v for k, v in evaluate(model, recipe, data, "val").items() if k != "n"}
        text += f"  val {task.says(row, 'val_')}  spikes {row['val_mean_spikes']:.3f}"
    if accelerator.is_main_process:
        _append(run, row)
    report.say(text)


# ------------------------------------------------------------------------------------------------- helpers
def _accelerator(recipe: Recipe) -> Accelerator:
    mixed = "no" if recipe.precision == "fp32" else recipe.precision
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError(f"recipe {recipe.name!r}, field precision='fp16': needs a GPU; use bf16 or fp32 here.")
    # accelerate keeps the first precision of the process for good; a program may train several recipes
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=mixed, gradient_accumulation_steps=recipe.accumulate, cpu=not torch.cuda.is_available())


def _working_model(recipe: Recipe, task: Task, data: Dataset) -> nn.Module:
    """The recipe's model, after a copy of it answered for one blank image. Errors: RecipeError if it cannot."""
    try:
        model = build(recipe)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            task.check(recipe, data, copy.deepcopy(model).eval(), as_input(normalise(task.blank(recipe, data), recipe)))
    except (DataError, PublishedWeightsError, RecipeError, RunError, SpecError):
        raise
    except Exception as error:  # whatever a model makes of sizes it is not meant for
        raise RecipeError(f"recipe {recipe.name!r}: its model does not work with image_size={recipe.image_size}, "
                          f"{len(recipe.mean)} values in mean and model_options={dict(recipe.model_options)}: "
                          f"{type(error).__name__}: {str(error).rstrip('.')}.") from error
    return model


def _mean(value: float, accelerator: Accelerator) -> float:
    """Mean over the processes."""
    if accelerator.num_processes == 1:
        return value
    total = torch.tensor(value, device=accelerator.device)
    torch.distributed.all_reduce(total)
    return float(total) / accelerator.num_processes


def _any(caught: int, accelerator: Accelerator) -> int:
    """The signal that any process caught, on all of them."""
    if accelerator.num_processes == 1:
        return caught
    flag = torch.tensor(caught, device=accelerator.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return int(flag)


def _nonfinite(run: Path, step: int, rate: float, model: nn.Module, task: Task, images: Tensor, targets: Any,
               accelerator: Accelerator) -> NonFinite:
    kept = "the last checkpoint is whole" if checkpoint_folder(run) else "there is no checkpoint yet"
    unshare_(model)  # other processes may have found nothing, and do not come along
    with accelerator.autocast():
        culprit = first_nonfinite(model, lambda: task.forward(model, images, targets))
    return NonFinite(f"the loss is not finite in step {step} (learning rate {rate:.3g}); first module with an output that is "
                     f"not finite: {culprit}. Lower lr, lengthen warmup_epochs or set grad_clip; {kept}.")


class _Caught:
    """What signals came, in the main thread; elsewhere nothing can be caught. `first`: the number of the first, or 0."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.first, self.report, self._message = 0, report, ""

    def note(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        if self._message:
            self._leave()

    def _leave(self) -> None:
        message, self._message = self._message, ""
        self.report(f"{signal.Signals(self.first).name}: {message}")
        raise Interrupted(128 + self.first)

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Inside, nothing is left to be saved: a signal ends the program with this message."""
        self._message = message
        try:
            if self.first:
                self._leave()
            yield
        finally:
            self._message = ""


@contextmanager
def _signals(report: Callable[[str], None]) -> Iterator[_Caught]:
    """Collect SIGINT and SIGTERM instead of dying of them."""
    caught = _Caught(report)
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before: dict[int, Any] = {s: signal.signal(s, caught.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _exact() -> Iterator[None]:
    """The same convolution algorithms in every run of a GPU."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
