"""The QuantizationAwareTraining callback: what a step computes, when, beside pruning, resumed, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lightning_prune import AveragedMinMax, Epochs, MinMax, OneShot, Pruning, Steps, quantize, quantized_layers
from lightning_prune.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_prune.callbacks.quantized_evaluation import QuantizedEvaluation
from lightning_prune.cli import PruneCLI
from lightning_prune.zoo import MLP, Digits
from lightning_prune.zoo.classifier import Classifier
from tests.support import BATCHES, EPOCHS, Tiny, Watch, fit, loader, share_of_zeros, trainer
from tests.test_resume import Manual, Scheduled, Stateful

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def plain(model: Any) -> bool:
    """No override is left, and names are those of the module."""
    return all("forward" not in vars(layer) for layer in model.modules()) and set(model.state_dict()) == set(
        type(model)().state_dict()
    )


def by_hand(model: Tiny, steps: int) -> None:
    """SGD on a network of torch's own fake quantisation: asymmetric, min-max ever seen, per channel."""
    optimizer: Any = model.configure_optimizers()
    low, high = [0.0, 0.0], [0.0, 0.0]

    def weight(layer: Any) -> Tensor:
        least, most = layer.weight.detach().amin(1).clamp(max=0), layer.weight.detach().amax(1).clamp(min=0)
        step = (most - least) / 15
        zero = torch.round(-least / step)
        return torch.fake_quantize_per_channel_affine(layer.weight, step, zero.int(), 0, 0, 15)

    def layer(number: int, x: Tensor) -> Tensor:
        low[number] = min(low[number], x.min().item())
        high[number] = max(high[number], x.max().item())
        step = (high[number] - low[number]) / 15
        x = torch.fake_quantize_per_tensor_affine(x, step, round(-low[number] / step), 0, 15)
        linear = model.net[2 * number]
        return nn.functional.linear(x, weight(linear), linear.bias)

    for number, (x, y) in enumerate(loader()):
        if number == steps:
            return
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(1, layer(0, x).relu()), y).backward()
        optimizer.step()


def test_steps_are_those_of_torchs_fake_quantisation() -> None:
    expected = Tiny()
    by_hand(expected, BATCHES)
    model = fit([QuantizationAwareTraining(4, ranges=MinMax(), freeze=1.0)], max_epochs=1)
    dense = fit([], max_epochs=1)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, expected.state_dict()[name], atol=1e-6)
        assert not torch.allclose(value, dense.state_dict()[name], atol=1e-4)
    assert plain(model)


@pytest.mark.parametrize(
    ("begin", "freeze", "first", "last"),
    [
        (0.0, 0.75, 0, 24),
        (0.25, 0.5, 8, 16),
        (Epochs(1), Epochs(3), 8, 24),
        (Steps(5), Steps(13), 5, 13),
        (Epochs(1), 1.0, 8, 32),
    ],
    ids=str,
)
def test_when(begin: Any, freeze: Any, first: int, last: int) -> None:
    callback = QuantizationAwareTraining(begin=begin, freeze=freeze)

    def look(*_: Any) -> Any:
        inner = callback.quantizers["net.2"].input
        return callback.running, callback.frozen, inner.observer.maximum.item(), inner.quantizer.scale.item()

    watch = Watch(look)
    model = fit([callback, watch])
    assert [running for running, *_ in watch.seen] == [step >= first for step in range(BATCHES * EPOCHS)]
    assert [frozen for _, frozen, *_ in watch.seen] == [step >= last for step in range(BATCHES * EPOCHS)]
    assert len({scale for running, frozen, _, scale in watch.seen if frozen}) <= 1
    following = [scale for running, frozen, _, scale in watch.seen if running and not frozen]
    assert len(set(following)) == last - first
    assert plain(model)


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"bits": 16}, {"net.0": (16, 16), "net.2": (16, 16)}),
        ({"bits": 2, "first_bits": 8, "last_bits": 4}, {"net.0": (8, 8), "net.2": (4, 4)}),
        ({"bits": {"*": 3}, "activation_bits": 6, "exclude": "net.0"}, {"net.2": (3, 6)}),
    ],
)
def test_widths(options: Any, widths: Any) -> None:
    callback = QuantizationAwareTraining(**options, weight_scheme="symmetric")
    model = fit([callback], max_epochs=2)
    grids = {n: (each.weight.quantizer.grid, each.input.quantizer.grid) for n, each in callback.quantizers.items()}
    assert {name: (weight.bits, of_input.bits) for name, (weight, of_input) in grids.items()} == widths
    assert {(weight.scheme, of_input.scheme) for weight, of_input in grids.values()} == {("symmetric", "asymmetric")}
    assert plain(model)
    assert not same(model, fit([], max_epochs=2))


def test_nothing_changes_before_it_begins() -> None:
    states: list[list[Any]] = []
    for callbacks in ([], [QuantizationAwareTraining(begin=Epochs(2))]):
        watch = Watch(lambda _, module: copy.deepcopy(module.state_dict()))
        fit([*callbacks, watch])
        states.append(watch.seen)
    equal = [all(torch.equal(one[n], other[n]) for n in one) for one, other in zip(*states, strict=True)]
    assert equal == [True] * 16 + [False] * 16


def test_epochs_where_the_loader_has_no_length() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from loader()

    callback = QuantizationAwareTraining(begin=Epochs(1), freeze=Epochs(2))
    watch = Watch(lambda *_: (callback.running, callback.frozen))
    data = torch.utils.data.DataLoader(Endless(), batch_size=None)
    trainer([callback, watch], max_epochs=3).fit(Tiny(), data, loader())
    assert watch.seen == [(False, False)] * 8 + [(True, False)] * 8 + [(True, True)] * 8


class Validated(Callback):
    """What validation sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, float, float]] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 0:
            self.plain = plain(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        twin = quantize(pl_module, list(loader())[:1], 3)
        losses = [nn.functional.cross_entropy(twin(x), y).item() for x, y in loader()]
        self.seen.append((self.plain, float(metrics["val_loss_int3"]), sum(losses) / len(losses)))


def test_with_pruning_averages_and_evaluation_zeros_stay_zeros(tmp_path: Path) -> None:
    seen: list[float] = []

    class Zeros(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            layer = pl_module.net[0]
            if callback.running and pruning.at_target:
                seen.append(float((callback.quantizers["net.0"].weight(layer.weight) == 0)[layer.weight == 0].all()))

    callback, pruning, validated = QuantizationAwareTraining(3), Pruning(0.7, end=0.5), Validated()
    keep = ModelCheckpoint(tmp_path, filename="last")
    plan: list[Callback] = [callback, pruning, QuantizedEvaluation(3), EMAWeightAveraging(decay=0.5), Zeros()]
    model = Tiny()
    trainer([*plan, keep], enable_checkpointing=True).fit(model, loader(), loader())
    assert share_of_zeros(model) == round(0.7 * 192) / 192
    assert seen
    assert all(seen)
    again = Tiny()
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert share_of_zeros(again) == share_of_zeros(model)
    fit([QuantizationAwareTraining(3), QuantizedEvaluation(3), validated], model)
    assert all(each for each, *_ in validated.seen)
    assert [loss for _, loss, _ in validated.seen] == pytest.approx([loss for *_, loss in validated.seen])


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"ranges": MinMax(), "bits": 4, "begin": Epochs(1), "freeze": Epochs(2), "outputs": True}],
    ids=["", "late"],
)
def test_resume_is_bit_equal(epoch: int, options: Any, tmp_path: Path) -> None:
    def build() -> list[Callback]:
        return [QuantizationAwareTraining(**options), Pruning(0.5)]

    keep, straight = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), Scheduled()
    whole, resumed = build(), build()
    trainer([*whole, keep], enable_checkpointing=True).fit(straight, loader(), loader())
    again = Scheduled(seed=1)
    path = tmp_path / f"epoch={epoch - 1}.ckpt"
    trainer(resumed).fit(again, loader(), loader(), ckpt_path=path, weights_only=True)
    assert same(straight, again)
    one, other = (each[0].quantizers for each in (whole, resumed))  # type: ignore[attr-defined]
    assert all(same(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("module", [Tiny, Manual])
def test_resume_in_mid_epoch(module: Any, tmp_path: Path) -> None:
    class SaveInTheMiddle(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    straight, again = module(), module(seed=1)
    trainer([QuantizationAwareTraining(), SaveInTheMiddle()]).fit(straight, Stateful(), loader())
    path = tmp_path / "middle.ckpt"
    trainer([QuantizationAwareTraining()]).fit(again, Stateful(), loader(), ckpt_path=path, weights_only=True)
    assert same(straight, again)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer([QuantizationAwareTraining(), keep], enable_checkpointing=True).fit(Tiny(), loader(), loader())
    for changed in (QuantizationAwareTraining(4), QuantizationAwareTraining(exclude="net.0")):
        with pytest.raises(ValueError, match=r"trained with other quantisation: .*bits=8.* then, .* now; resume with"):
            trainer([changed], max_epochs=6).fit(
                Tiny(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
            )


def test_one_trainer_goes_on_and_one_callback_serves_two() -> None:
    callback, model = QuantizationAwareTraining(freeze=Epochs(2)), Tiny()
    loop = trainer([callback], max_epochs=3)
    loop.fit(model, loader(), loader())
    scale = callback.quantizers["net.2"].input.quantizer.scale.clone()
    loop.fit_loop.max_epochs = 4
    loop.fit(model, loader(), loader())
    assert torch.equal(callback.quantizers["net.2"].input.quantizer.scale, scale)
    again = fit([callback], Tiny(seed=3))
    assert same(again, fit([QuantizationAwareTraining(freeze=Epochs(2))], Tiny(seed=3)))


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}, {"fast_dev_run": 3}])
def test_mixed_precision_accumulation_and_trial_runs(options: Any) -> None:
    callback = QuantizationAwareTraining()
    model = fit([callback, Pruning(0.5)], **options)
    assert callback.frozen
    assert plain(model)
    assert share_of_zeros(model) == 0.5
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_layers_that_do_not_run_and_trainings_too_short() -> None:
    class Spare(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    with pytest.warns(UserWarning, match="not called in training, so they stayed in floating point: spare; list them"):
        fit([QuantizationAwareTraining()], Spare())
    fit([QuantizationAwareTraining(exclude="spare")], Spare())

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"stopped before Epochs\(n=2\), where quantisation-aware training begins"):
        fit([QuantizationAwareTraining(begin=Epochs(2), freeze=Epochs(3)), Stop()])


def test_activations_without_a_range() -> None:
    class Broken(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 0 if self.global_step == 3 else x)

    model = Broken()
    with pytest.raises(ValueError, match=r"layer 'net\.0': values from .* have no finite range.*lower the learning"):
        fit([QuantizationAwareTraining()], model)
    assert plain(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits is a width of 2 to 8, or 16, got bits=1"),
        ({"begin": 1.5}, r"begin is a share of training in \[0, 1\]"),
        ({"freeze": -0.5}, r"freeze is a share of training in \[0, 1\]"),
        ({"begin": 0.5, "freeze": 0.5}, "begin < freeze, got begin=0.5, freeze=0.5"),
        ({"begin": Steps(5), "freeze": Steps(4)}, r"begin < freeze, got begin=Steps\(n=5\)"),
        ({"begin": Epochs(1), "freeze": Steps(8)}, r"begin < freeze, got begin=Epochs\(n=1\), freeze=Steps\(n=8\)"),
        ({"begin": Epochs(4), "freeze": Epochs(5)}, "after 32 steps, but training lasts 32; lower begin"),
        ({"freeze": Steps(33)}, "ranges would freeze at .*, after 33 steps, but training lasts 32; lower freeze"),
        ({"exclude": "net.9"}, "exclude names 'net.9', which matches none"),
        ({"exclude": "*"}, "nothing is left to quantise"),
    ],
)
def test_what_makes_no_sense(options: Any, message: str) -> None:
    model = Tiny()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        fit([QuantizationAwareTraining(**options)], model)
    assert same(model, before)


def test_company_that_is_refused() -> None:
    loop = trainer([])
    loop._accelerator_connector.strategy = FSDPStrategy(accelerator=None)
    with pytest.raises(ValueError, match="needs whole weights, FSDPStrategy shards them"):
        QuantizationAwareTraining().setup(loop, Tiny(), "fit")

    class Other(QuantizationAwareTraining):
        state_key = "other"

    with pytest.raises(ValueError, match="two QuantizationAwareTraining callbacks would quantise layers twice"):
        fit([QuantizationAwareTraining(), Other(4)])


def test_from_yaml(tmp_path: Path) -> None:
    options = {
        "bits": {"*": 4},
        "ranges": {"class_path": "lightning_prune.AveragedMinMax", "init_args": {"momentum": 0.9}},
        "begin": {"class_path": "Epochs", "init_args": {"n": 1}},
        "freeze": 0.5,
    }
    path = tmp_path / "qat.yaml"
    where = "lightning_prune.callbacks.quantization_aware_training.QuantizationAwareTraining"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": where, "init_args": options}]}}))
    configs = [f"--config={Path(__file__).parents[2] / 'configs' / 'digits.yaml'}", f"--config={path}"]
    cli = PruneCLI([*configs, "--trainer.accelerator=cpu", "--trainer.logger=false"], run=False)
    [callback] = [each for each in vars(cli.trainer)["callbacks"] if isinstance(each, QuantizationAwareTraining)]
    assert (callback.settings.bits, callback.settings.ranges) == ({"*": 4}, AveragedMinMax(0.9))
    assert (callback.begin, callback.freeze) == (Epochs(1), 0.5)


def test_digits_in_two_bits_at_90_percent() -> None:
    """After it, three bits are within 3 points of floating point, and better than without it."""

    def drop(*callbacks: Callback) -> tuple[float, float]:
        seed_everything(0, verbose=False)
        model = Classifier(MLP([64, 100, 10]), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
        data = Digits()
        trainer([*callbacks, Pruning(0.9, OneShot(), begin=0.3)], max_epochs=8).fit(model, data)
        [metrics] = trainer([QuantizedEvaluation(2, activation_bits=8)]).test(model, data, verbose=False)
        assert list(quantized_layers(quantize(model, [torch.ones(1, 64)])))
        return metrics["test_acc_int2"], metrics["test_acc_int2_drop"]

    without, with_it = drop(), drop(QuantizationAwareTraining(2, activation_bits=8, begin=0.5, freeze=0.9))
    assert with_it[0] > without[0]
    assert with_it[1] < 0.03
