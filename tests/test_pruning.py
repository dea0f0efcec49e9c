"""The Pruning callback: windows, targets, several at once, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import (
    AGP,
    NM,
    Epochs,
    Filter,
    GradientMagnitude,
    Iterative,
    Kernel,
    LearningRateRewinding,
    Linear,
    Magnitude,
    OneShot,
    Pruner,
    Pruning,
    SparsityPlan,
    Steps,
    WeightRewinding,
)
from lightning_prune.criteria import Criterion, Evidence
from tests.contracts.tables import CRITERIA, SCHEDULES
from tests.support import BATCHES, EPOCHS, Tiny, Watch, fit, loader, sgd, share_of_zeros, trainer

TOTAL = BATCHES * EPOCHS
WEIGHTS = 8 * 16 + 16 * 4


def sparsity_per_step() -> Watch:
    return Watch(lambda _, module: share_of_zeros(module))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("every", [None, Steps(5), 0.3, Epochs(1)], ids=str)
def test_target_is_exact_whatever_schedule_and_cadence(schedule: Any, every: Any) -> None:
    pruning, watch = Pruning(0.7, schedule, every=every, end=0.7), sparsity_per_step()
    model = fit([pruning, watch])
    assert share_of_zeros(model) == round(0.7 * WEIGHTS) / WEIGHTS
    assert pruning.at_target
    assert watch.seen == sorted(watch.seen)


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_every_criterion_during_fit(criterion: Any) -> None:
    model = fit([Pruning(0.6, criterion=criterion)])
    assert share_of_zeros(model) == round(0.6 * WEIGHTS) / WEIGHTS


@given(begin=st.integers(0, 20), length=st.integers(1, 12), every=st.integers(1, 40))
@settings(max_examples=10)
def test_window_is_kept(begin: int, length: int, every: int) -> None:
    watch = sparsity_per_step()
    fit([Pruning(0.5, Linear(), begin=Steps(begin), end=Steps(begin + length), every=Steps(every)), watch])
    for step, seen in enumerate(watch.seen, start=1):
        if step <= begin:
            assert seen == 0
        elif step >= begin + length:
            assert seen == 0.5
        else:
            due = (step - begin) // every * every / length
            assert seen == round(0.5 * due * WEIGHTS) / WEIGHTS


def test_one_shot_prunes_before_the_first_step() -> None:
    watch = sparsity_per_step()
    fit([Pruning(0.5, OneShot()), watch])
    assert watch.seen == [0.5] * TOTAL


def test_initial_and_targets_per_layer_are_one_callback() -> None:
    # DeGirum's recipe in small: from 5 % to 70 % in one layer and to 87 % in the other, with one AGP.
    first = Watch(lambda _, module: [share_of_zeros(module, name) for name in ("net.0.weight", "net.2.weight")])
    plan = {"net.0*": 0.7, "net.2.weight": 0.87}
    fit([Pruning(plan, AGP(), initial=0.05, begin=Steps(4), end=Steps(20), every=Steps(4)), first])
    for step, (conv, fc) in enumerate(first.seen, start=1):
        gone = 1 - (1 - min(max((step // 4 * 4 - 4) / 16, 0), 1)) ** 3
        begun = step >= 4
        assert conv == (round((0.05 + 0.65 * gone) * 128) / 128 if begun else 0)
        assert fc == (round((0.05 + 0.82 * gone) * 64) / 64 if begun else 0)


def test_two_callbacks_with_their_own_windows() -> None:
    body = Pruning({"net.0.weight": 0.75}, begin=Epochs(0), end=Epochs(3), every=Epochs(1))
    head = Pruning({"net.2.weight": 0.5}, Iterative(2), granularity=Filter(), begin=Epochs(1), end=Epochs(2))
    body_seen = Watch(lambda _, module: share_of_zeros(module, "net.0.weight"))
    head_seen = Watch(lambda _, module: share_of_zeros(module, "net.2.weight"))
    model = fit([body, head, body_seen, head_seen])
    assert body.state_key != head.state_key
    assert body_seen.seen[BATCHES * 3 - 2] < body_seen.seen[BATCHES * 3 - 1] == 0.75
    assert head_seen.seen[BATCHES - 1] == 0
    assert head_seen.seen[BATCHES * 2 - 1] == 0.5
    assert int((model.net[2].weight == 0).all(dim=1).sum()) == 2


def test_what_is_to_stay_dense_is_left_to_others() -> None:
    body, head = Pruning({"*": 0.75, "net.2*": 0.0}), Pruning({"net.2.weight": 0.5})
    model = fit([body, head])
    assert list(body.plan) == ["net.0.weight"]
    assert share_of_zeros(model, "net.2.weight") == 0.5


def test_nothing_to_prune_is_a_plan_too() -> None:
    pruning = Pruning(0.0)
    model = fit([pruning])
    assert pruning.at_target
    assert share_of_zeros(model) == 0.0


def test_default_targets_and_what_a_name_adds() -> None:
    pruning = Pruning({"*": 0.5, "net.0.bias": 0.25})
    model = fit([pruning])
    assert list(pruning.plan) == ["net.0.weight", "net.0.bias", "net.2.weight"]
    assert int((model.net[0].bias == 0).sum()) == 4
    assert not (model.net[2].bias == 0).any()


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("local", [64, 32]), ("filter", [64, 32]), ({"a": ["net.0*"], "b": "net.2*"}, [64, 32])],
    ids=str,
)
def test_scopes(scope: Any, expected: list[int]) -> None:
    pruning = Pruning(0.5, scope=scope)
    fit([pruning])
    per_filter = {int((~row).sum()) for mask in pruning.masks.values() for row in mask}
    assert (per_filter == {4, 8}) == (scope == "filter")
    assert [int((~mask).sum()) for mask in pruning.masks.values()] == expected


def test_plan_may_be_a_path_and_carry_granularities(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    SparsityPlan({"net.0.weight": (0.5, NM(2, 4)), "net.2.weight": 0.25}).save(path)
    model = fit([Pruning(str(path))])
    assert ((model.net[0].weight.reshape(-1, 4) == 0).sum(dim=1) == 2).all()
    assert share_of_zeros(model, "net.2.weight") == 0.25


def test_best_checkpoint_is_fully_sparse(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_acc_at_target", mode="max", filename="best")
    pruning = Pruning(0.8, end=0.5, every=Steps(1))
    model = Tiny()
    loop = trainer([best, pruning], enable_checkpointing=True)
    loop.fit(model, loader(), loader())
    stored = torch.load(best.best_model_path, weights_only=True)
    plain = Tiny()
    plain.load_state_dict(stored["state_dict"])  # plain names, no help from this package
    assert share_of_zeros(plain) == round(0.8 * WEIGHTS) / WEIGHTS
    assert best.best_model_score is not None
    assert math.isfinite(best.best_model_score)
    assert loop.callback_metrics["val_loss_at_target"] == loop.callback_metrics["val_loss"]


def test_metrics_do_not_count_before_the_target() -> None:
    class Note(Callback):
        seen: list[float]

        def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
            self.seen.append(float(trainer.callback_metrics["val_acc_at_target"]))

    note = Note()
    note.seen = []
    fit([Pruning(0.8, end=Epochs(3)), note])
    assert [math.isnan(value) for value in note.seen] == [True, True, False, False]


def test_weight_rewinding_goes_back_to_epoch_k() -> None:
    at_epoch_one: dict[str, Tensor] = {}

    def look(loop: Trainer, module: Any) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in module.state_dict().items()}

    watch = Watch(look)
    pruning = Pruning(0.5, OneShot(), begin=Epochs(2), end=1.0, rewind=WeightRewinding(to=Epochs(1)))
    watching_first = Watch(look)
    fit([watching_first, pruning, watch])
    at_epoch_one = watching_first.seen[BATCHES - 1]
    rewound = watch.seen[2 * BATCHES - 1]
    trained = watching_first.seen[2 * BATCHES - 1]
    for name, value in rewound.items():
        mask = pruning.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value[mask], at_epoch_one[name][mask])
        assert not value[~mask].any()
        assert not torch.equal(trained[name], at_epoch_one[name])
    # The mask was chosen from the trained weights, not from the rewound ones.
    scores = torch.cat([trained[name].abs().flatten() for name in pruning.masks])
    kept = torch.cat([mask.flatten() for mask in pruning.masks.values()])
    assert scores[kept].min() >= scores[~kept].max()


def test_lottery_ticket_rewinds_to_initialisation_at_each_step() -> None:
    initial = {name: value.clone() for name, value in Tiny().state_dict().items()}
    pruning = Pruning(0.5, Iterative(2), end=0.5, rewind=WeightRewinding())
    watch = Watch(
        lambda _, module: (
            all(torch.equal(module.state_dict()[n], initial[n] * pruning.masks.get(n, 1)) for n in initial)
            if pruning.updates
            else False
        )
    )
    fit([pruning, watch])
    assert [step for step, back in enumerate(watch.seen, start=1) if back] == [8, 16]
    assert pruning.at_target


def test_rewinding_waits_until_something_is_removed() -> None:
    trained = Watch(lambda _, module: module.get_parameter("net.0.weight").detach().clone())
    seen = Watch(lambda _, module: module.get_parameter("net.0.weight").detach().clone())
    pruning = Pruning(0.5, Iterative(2), begin=Steps(16), end=Steps(32), every=Steps(1), rewind=WeightRewinding())
    fit([trained, pruning, seen])
    assert torch.equal(trained.seen[15], seen.seen[15])  # the window begins, nothing is removed: nothing goes back
    initial = Tiny().get_parameter("net.0.weight").detach()
    gone = seen.seen[23] == 0
    assert torch.equal(seen.seen[23], torch.where(gone, 0, initial))


def test_callbacks_that_rewind_together_score_trained_weights() -> None:
    names = ("net.0.weight", "net.2.weight")
    trained = Watch(lambda _, module: [module.get_parameter(name).detach().clone() for name in names])
    options: dict[str, Any] = {"begin": Steps(16), "end": 1.0, "rewind": WeightRewinding()}
    both = [Pruning({name: 0.5}, OneShot(), **options) for name in names]
    fit([trained, *both])
    for pruning, weight in zip(both, trained.seen[15], strict=True):
        [kept] = pruning.masks.values()
        assert weight.abs()[kept].min() >= weight.abs()[~kept].max()


class Normed(Tiny):
    """With BatchNorm, Adam and its state."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda p: torch.optim.Adam(p, lr=0.01), **options)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def test_weight_rewinding_covers_statistics_and_optimizer_state() -> None:
    states = Watch(lambda loop, _: len(loop.optimizers[0].state))
    steps = Watch(lambda loop, _: [float(state["step"]) for state in loop.optimizers[0].state.values()])
    pruning = Pruning(0.5, OneShot(), begin=Steps(10), end=1.0, rewind=WeightRewinding())
    fresh = Normed().state_dict()
    fit([pruning, states, steps], Normed())
    assert states.seen[9] == 0
    assert steps.seen[11] == [2.0] * 6
    model = Normed()
    seen = Watch(lambda _, module: {name: value.clone() for name, value in module.state_dict().items()})
    fit([Pruning(0.5, OneShot(), begin=Steps(10), end=1.0, rewind=WeightRewinding()), seen], model)
    assert torch.equal(seen.seen[9]["net.1.running_mean"], fresh["net.1.running_mean"])
    assert seen.seen[9]["net.1.num_batches_tracked"] == 0
    assert not torch.equal(seen.seen[8]["net.1.running_mean"], fresh["net.1.running_mean"])


def test_learning_rate_rewinding_restores_the_schedule() -> None:
    class Decaying(Tiny):
        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    rates = Watch(lambda loop, _: loop.optimizers[0].param_groups[0]["lr"])
    weights = Watch(lambda _, module: module.get_parameter("net.0.weight").detach().clone())
    pruning = Pruning(0.5, OneShot(), begin=Steps(20), end=1.0, rewind=LearningRateRewinding(to=Epochs(1)))
    fit([weights, pruning, rates], Decaying())
    # Epochs of 8 steps at 0.05, 0.025, 0.0125; Lightning has set the next epoch's rate when its last batch ends.
    assert rates.seen[14] == pytest.approx(0.025)
    assert rates.seen[18] == pytest.approx(0.0125)
    assert rates.seen[19] == pytest.approx(0.025)  # rewound after step 20
    assert rates.seen[23] == pytest.approx(0.0125)
    kept = pruning.masks["net.0.weight"]
    assert (weights.seen[20] - weights.seen[19])[kept].abs().max() < 0.1  # weights went on ...
    assert (weights.seen[20] - weights.seen[7])[kept].abs().max() > 0.1  # ... and not back


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from loader().dataset  # type: ignore[misc]


def stream() -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(Stream(), batch_size=8)


def test_unsized_loader_with_epochs_or_steps() -> None:
    for begin, end in ((Epochs(1), Epochs(3)), (Steps(8), Steps(24)), (0.0, Epochs(3))):
        watch = sparsity_per_step()
        trainer([Pruning(0.5, Linear(), begin=begin, end=end), watch]).fit(Tiny(), stream(), loader())
        assert watch.seen[22] < watch.seen[23] == watch.seen[-1] == 0.5


def test_unsized_loader_with_a_share_of_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"end=0\.75 is a share of training.*unsized loader.*max_steps"):
        trainer([Pruning(0.5)]).fit(Tiny(), stream(), loader())


def test_unsized_loader_with_max_steps_knows_its_length() -> None:
    watch = sparsity_per_step()
    trainer([Pruning(0.5, Linear()), watch], max_epochs=-1, max_steps=20).fit(Tiny(), stream(), loader())
    assert watch.seen[13] < watch.seen[14] == 0.5


def test_early_end_is_reported() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    pruning = Pruning(0.5)
    with pytest.warns(UserWarning, match=r"training stopped after 5 steps, pruning ends after 24.*lower end"):
        fit([pruning, Stop()], min_epochs=0)
    assert not pruning.at_target


def test_max_time_keeps_masks_and_says_that_the_plan_was_not_reached() -> None:
    pruning = Pruning(0.5, end=Steps(90), begin=Steps(0), initial=0.25)
    with pytest.warns(UserWarning, match="pruning ends after 90: the plan was not reached"):
        model = fit([pruning], max_epochs=1000, max_time={"milliseconds": 1})
    assert 0.25 <= share_of_zeros(model) < 0.5
    assert sum(int((~mask).sum()) for mask in pruning.masks.values()) / WEIGHTS == share_of_zeros(model)


def test_unsized_loader_with_epochs_past_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="after 30 epochs, but training lasts 4"):
        trainer([Pruning(0.5, end=Epochs(30))]).fit(Tiny(), stream(), loader())


def test_lazy_layers_are_refused() -> None:
    model = Tiny()
    model.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'net\.0\.weight' of a lazy layer has no shape yet; run the model"):
        Pruner(model, SparsityPlan({"*": 0.5}))


def test_frozen_weights_give_no_gradients() -> None:
    model = Tiny()
    model.net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"needs gradients, but 'net\.0\.weight' is frozen"):
        fit([Pruning(0.5, criterion=GradientMagnitude())], model)
    fit([Pruning(0.5)], model)


def test_a_star_names_no_biases() -> None:
    model = Tiny()
    model.net = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"has no conv or linear weights, which '\*' stands for; name what"):
        fit([Pruning(0.5)], model)


def test_a_criterion_of_a_wrong_shape_is_named() -> None:
    class Row(Criterion):
        def score(self, evidence: Evidence) -> Tensor:
            return evidence.weight.abs().sum(dim=1)

    with pytest.raises(ValueError, match=r"scores 'net\.0\.weight' of shape \[16, 8\] by a tensor of shape \[16\]"):
        fit([Pruning(0.5, criterion=Row())])


def test_fast_dev_run_goes_through_everything() -> None:
    pruning = Pruning(0.5, begin=Epochs(10), end=Epochs(30))
    model = fit([pruning], fast_dev_run=True)
    assert pruning.at_target
    assert share_of_zeros(model) == 0.5


def test_divergence_is_reported() -> None:
    class Diverge(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 26:
                with torch.no_grad():
                    pl_module.net[0].weight[0, 0] = math.nan

    with pytest.warns(UserWarning, match=r"'net\.0\.weight' are NaN or infinite: training has diverged"):
        fit([Diverge(), Pruning({"net.0.weight": 0.5})])


def test_divergence_during_pruning_stops_it() -> None:
    def diverge(_: Any, module: Any) -> None:
        with torch.no_grad():
            module.net[0].weight.fill_(math.nan)

    with pytest.raises(ValueError, match=r"scores of 'net\.0\.weight' are NaN: the network has diverged; lower"):
        fit([Watch(diverge), Pruning(0.5)])


def test_a_layer_that_dies_is_reported() -> None:
    model = Tiny()
    with torch.no_grad():
        model.net[2].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"all weights of 'net\.2\.weight' have been removed"):
        fit([Pruning(0.5, OneShot())], model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Pruning(1.5), r"entry '\*': sparsity is the fraction removed, in \[0, 1\], got 1\.5"),
        (lambda: Pruning(-0.1), r"got -0\.1"),
        (lambda: Pruning(math.nan), "got nan"),
        (lambda: Pruning({"fc": 90}), "entry 'fc'.*got 90"),
        (lambda: Pruning(0.5, begin=0.6, end=0.5), r"needs begin < end, got begin=0\.6, end=0\.5; lower begin or"),
        (lambda: Pruning(0.5, begin=Epochs(3), end=Epochs(3)), "needs begin < end"),
        (lambda: Pruning(0.5, end=75), r"end is a share of training in \[0, 1\].*got end=75"),
        (lambda: Pruning(0.5, every=-1.0), "every=-1"),
        (lambda: Pruning(0.5, scope="layer"), "scope is 'global', 'local', 'filter'.*got 'layer'"),
        (
            lambda: Pruning(0.5, OneShot(), rewind=WeightRewinding(to=1.5)),
            r"rewind\.to is a share.*got rewind\.to=1\.5",
        ),
        (lambda: Pruning(0.5, AGP), r"schedule is an object such as AGP\(\), got <class"),  # type: ignore[arg-type]
        (lambda: Pruning(0.5, Magnitude()), r"schedule is an object.*got Magnitude"),  # type: ignore[arg-type]
        (lambda: Pruning(0.5, granularity=Filter), "granularity is an object"),  # type: ignore[arg-type]
        (lambda: Pruning(0.5, rewind=WeightRewinding()), "AGP.*changes masks at every update.*OneShot"),
    ],
)
def test_bad_arguments_are_refused_when_built(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (Pruning({"net.0.wieght": 0.5}), r"'net\.0\.wieght', which matches no parameter of Tiny; closest: 'net\.0\.we"),
        (Pruning(SparsityPlan({"conv1.weight": 0.5})), "'conv1.weight', which matches no parameter of Tiny"),
        (Pruning(0.5, granularity=NM(2, 3)), "NM.*'net.0.weight' of shape.*groups of 3 do not divide its 8 inputs"),
        (Pruning(0.75, granularity=NM(2, 4)), "NM.*removes exactly 0.5 of a weight, not 0.75"),
        (Pruning(0.5, granularity=Kernel()), r"Kernel\(\) on 'net\.0\.weight'.*only weights of convolutions"),
        (Pruning(0.5, granularity=Filter(), scope="filter"), r"Filter\(\) on .*does not go with scope='filter'"),
        (Pruning(0.5, begin=Steps(20), end=Epochs(2)), "which are steps 20 and 16 of this training"),
        (Pruning(0.5, begin=Epochs(0), end=Epochs(9)), "after 72 steps, but training lasts 32"),
        (Pruning(0.5, OneShot(), GradientMagnitude()), r"needs gradients, but OneShot\(\) prunes before.*Steps\(1\)"),
        (Pruning(0.5, criterion=GradientMagnitude(), initial=0.1), r"needs gradients, but AGP.* prunes before"),
        (Pruning(0.5, initial=0.6), r"initial sparsity 0\.6 of 'net\.0\.weight' is above its target 0\.5"),
        (Pruning(0.5, OneShot(), rewind=WeightRewinding(Epochs(1))), "rewinding to Epochs.*needs pruning to begin"),
        (Pruning(0.5, scope={"a": ["net.0*"]}), r"no scope group holds 'net\.2\.weight'"),
        (
            Pruning({"net.0*": (0.5, NM(2, 4)), "net.2*": 0.9}, scope={"all": ["*"]}),
            r"'net\.0\.weight' \(NM.*and 'net\.2\.weight' \(Unstructured.*share a budget",
        ),
        (Pruning(0.5, scope={"a": ["net*"], "b": ["net.2*"]}), "in two scope groups, 'a' and 'b'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_combinations_are_refused_before_training(pruning: Pruning, message: str) -> None:
    model = Tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit([pruning], model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_overlapping_callbacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two Pruning callbacks prune 'net\.2\.weight'"):
        fit([Pruning(0.5), Pruning({"net.2.weight": 0.5}, criterion=Magnitude(2))])


@pytest.mark.parametrize("content", ["{", "- 1\n- 2", "schema: other/9\nsparsity: {}", "fc: much", "\x00"], ids=repr)
def test_corrupted_plan_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"plan\.yaml"):
        Pruning(path)


def test_plan_without_a_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"no sparsity plan at 'nowhere\.yaml'.*number \(without quotes\)"):
        Pruning("nowhere.yaml")


def test_module_without_weights_is_refused() -> None:
    model = Tiny()
    model.net = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    pruning = Pruning({"net.0.weight": 0.5})
    fit([pruning], model)  # named, so it is pruned
    assert share_of_zeros(model, "net.0.weight") == 0.5
    model.net[0].weight.data.fill_(1)
    with pytest.raises(ValueError, match=r"'net\.2\.weight', which matches no parameter"):
        fit([Pruning({"net.2.weight": 0.5})], model)
