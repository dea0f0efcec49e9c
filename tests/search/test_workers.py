"""Several processes share one study."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lightning_prune.search.claims import Terms, cost_of, dropped, verdict
from lightning_prune.search.parameters import LEAST, MOST
from lightning_prune.search.space import Candidate
from lightning_prune.search.storages import open_storage, release
from lightning_prune.search.study import minimise
from lightning_prune.search.trials import Run
from lightning_prune.search.workers import RETRIES, Worker, retry_dead
from tests.search.analytic import Network, space

# One process imports everything once; workers are forked from it, not from this one, which has threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

EVALUATIONS, MAX_DROP = 12, 1e-4


def run_worker(storage: str, log: str, seed: int, victim: bool, begin: Any) -> None:
    """A worker. One that is a victim never comes back from its second evaluation."""

    def before(number: int, candidate: Candidate) -> None:
        hangs = victim and number == 2
        said = json.dumps([os.getpid(), list(candidate.choices), hangs]) + "\n"
        descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(descriptor, said.encode())
        os.close(descriptor)
        time.sleep(300.0 if hangs else 0.01)
        # Nobody is left without an evaluation, however late it comes.
        while number == 1 and len({pid for pid, *_ in lines(Path(log))}) < begin.parties:
            time.sleep(0.01)
        # The others leave the victim enough to do.
        while not victim and number == 3 and not any(each for *_, each in lines(Path(log))):
            time.sleep(0.01)

    of = space(items=3, levels=6)
    begin.wait()
    minimise(
        of,
        Network(of, before=before),
        metric="val_acc",
        mode="max",
        max_drop=MAX_DROP,
        dense_accuracy=0.95,
        n_trials=EVALUATIONS,
        # All of them propose much the same, so that they meet.
        sampler=optuna.samplers.RandomSampler(seed=seed // 2),
        storage=storage,
        study_name="shared",
        progress=False,
    )


def lines(log: Path) -> list[tuple[int, tuple[int, ...], bool]]:
    if not log.exists():
        return []
    return [(pid, tuple(choices), hangs) for pid, choices, hangs in map(json.loads, log.read_text().splitlines())]


def share(storage: str, folder: Path, workers: int) -> None:
    """Workers on one study, of which the first is killed in an evaluation: nothing is lost, nothing done twice."""
    log = folder / "log"
    begin = PROCESSES.Barrier(workers)
    processes = [
        PROCESSES.Process(target=run_worker, args=(storage, str(log), seed, seed == 0, begin), daemon=True)
        for seed in range(workers)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    while not any(hangs for *_, hangs in lines(log)):
        assert time.monotonic() < deadline, "the victim never began its second evaluation"
        assert processes[0].is_alive()
        time.sleep(0.01)
    processes[0].kill()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-9] + [0] * (workers - 1)

    opened = open_storage(storage)
    trials = optuna.load_study(study_name="shared", storage=opened).trials
    release(opened)
    ended = {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert {t.state for t in trials if "retry_of" not in t.user_attrs} <= ended
    done = [t for t in trials if t.state == TrialState.COMPLETE and "plan" in t.user_attrs]
    assert len(done) == EVALUATIONS - 1
    assert len({tuple(t.user_attrs["candidate"]["choices"]) for t in done}) == len(done)
    assert [t.number for t in trials] == list(range(len(trials)))

    # What they wrote themselves says the same, and that all of the living took part.
    begun = lines(log)
    (killed,) = (choices for _, choices, hangs in begun if hangs)
    assert Counter(choices for _, choices, _ in begun) == Counter(
        [killed, *(tuple(t.user_attrs["candidate"]["choices"]) for t in done)]
    )
    assert len({pid for pid, *_ in begun}) == workers
    (failed,) = (t for t in trials if t.state == TrialState.FAIL)
    same = [t for t in done if tuple(t.user_attrs["candidate"]["choices"]) == killed]
    retries = [t for t in trials if t.user_attrs.get("retry_of") == failed.number]
    if not retries:  # between the death and the retry, another worker proposed the very same plan, and evaluated it
        assert workers > 2
        assert [t.number > failed.number for t in same] == [True]
        return
    (again,) = retries
    if again.state == TrialState.WAITING:  # the others had made all evaluations before it was its turn
        assert again.user_attrs["proposal"] == failed.params
        return
    assert again.params == failed.params
    assert tuple(again.user_attrs["candidate"]["choices"]) == killed
    if again.state == TrialState.COMPLETE:
        assert "plan" in again.user_attrs or f"trial {same[0].number} " in again.user_attrs["reason"]
        return
    # By then the others had made evaluations that leave it nothing to find.
    assert again.state == TrialState.PRUNED
    cheaper = [t for t in done if dropped(t) <= MAX_DROP and cost_of(t) <= cost_of(again)]
    true = {
        "is not below the incumbent's": bool(cheaper),
        "evaluations are taken": True,  # as many as there are, see above
        **{f"trial {t.number} is evaluating the same plan": True for t in same},
    }
    assert any(words in again.user_attrs["reason"] for words, so in true.items() if so)


@pytest.mark.parametrize("name", ["study.db", "study.journal"])
def test_two_workers_share_a_file(tmp_path: Path, name: str) -> None:
    share(str(tmp_path / name), tmp_path, workers=2)


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server, without the name of a database."""
    pytest.importorskip("psycopg", reason="needs psycopg, the driver of PostgreSQL")
    programs = {name: shutil.which(name) for name in ("initdb", "pg_ctl", "createdb")}
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    programs = {name: path or shutil.which(name, path=":".join(map(str, folders))) for name, path in programs.items()}
    if not all(programs.values()):
        pytest.skip(f"needs the programs of PostgreSQL: {sorted(name for name, path in programs.items() if not path)}")
    user: list[str] = []
    folder = tmp_path_factory.mktemp("postgresql")
    if os.geteuid() == 0:  # the server refuses to run as root
        setpriv, nobody = shutil.which("setpriv"), 65534
        if setpriv is None:
            pytest.skip("PostgreSQL does not run as root, and there is no setpriv")
        # pytest's own folders are closed to other users.
        folder = Path(subprocess.run(["mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
        os.chown(folder, nobody, nobody)
        user = [setpriv, f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups"]

    def run(*command: str | None) -> None:
        subprocess.run([*user, *map(str, command)], check=True, capture_output=True, cwd=folder)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, options = str(folder / "data"), f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    run(programs["initdb"], "-D", data, "-U", "tester", "-A", "trust", "--no-sync")
    run(programs["pg_ctl"], "-D", data, "-w", "-l", str(folder / "server.log"), "-o", options, "start")
    try:
        yield f"postgresql://tester@127.0.0.1:{port}"
    finally:
        run(programs["pg_ctl"], "-D", data, "-m", "immediate", "stop")
        if user:
            shutil.rmtree(folder)


@pytest.fixture
def database(postgresql: str, request: pytest.FixtureRequest) -> str:
    """URL of an empty database."""
    import psycopg

    name = "search_" + "".join(filter(str.isalnum, request.node.name))
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return f"{postgresql}/{name}"


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_a_database_server(database: str, tmp_path: Path, workers: int) -> None:
    share(database, tmp_path, workers)


# The pieces by themselves


def trial_like(number: int, state: TrialState, **attributes: Any) -> optuna.trial.FrozenTrial:
    trial = optuna.trial.create_trial(state=state, value=1.0 if state == TrialState.COMPLETE else None)
    trial.number = number
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    return trial


def proposal(choices: list[int], cost: float = 5.0) -> dict[str, Any]:
    return {"choices": choices, "cost": cost}


TERMS = Terms(evaluations=10, dense_cost=8.0, dense_accuracy=0.9, max_drop=0.01)
RUNNING, COMPLETE = TrialState.RUNNING, TrialState.COMPLETE


def done(number: int, choices: list[int], cost: float, drop: float) -> optuna.trial.FrozenTrial:
    outcome = {"accuracy": 0.9 - drop, "drop": drop}
    return trial_like(number, COMPLETE, candidate=proposal(choices, cost), plan={}, outcome=outcome)


def test_verdicts() -> None:
    def of(*trials: optuna.trial.FrozenTrial, cost: float = 5.0, number: int = 5, terms: Terms = TERMS) -> Any:
        return verdict(number, (1, 2), cost, trials, terms)

    assert of().evaluate
    assert not of().waits
    # Known: evaluated by a finished trial, not by one that was passed over or failed.
    known = of(done(0, [1, 2], 5.0, 0.005))
    assert (known.evaluate, known.known, known.accuracy) == (False, True, 0.895)
    assert of(trial_like(0, COMPLETE, candidate=proposal([1, 2]), reason="dear")).evaluate
    assert of(trial_like(0, TrialState.FAIL, candidate=proposal([1, 2]), plan={})).evaluate
    assert verdict(5, (0, 0), 8.0, [], TERMS).accuracy == 0.9
    # Dear: not below the cheapest that is feasible, or below dense.
    assert of(cost=8.0).reason == "a cost of 8 is not below the incumbent's 8"
    assert of(cost=7.999).evaluate
    assert of(done(0, [1, 1], 5.0, 0.01)).reason == "a cost of 5 is not below the incumbent's 5"
    assert of(done(0, [1, 1], 4.0, 0.01)).excess == 0.25
    assert of(done(0, [1, 1], 4.0, 0.011)).evaluate
    assert of(done(0, [1, 1], 4.0, 0.0), terms=Terms(10, 8.0, 0.9, None)).evaluate
    # Claimed: by any that evaluates already, by an earlier one that has yet to decide.
    assert of(trial_like(9, RUNNING, candidate=proposal([1, 2]), plan={})).busy
    assert of(trial_like(4, RUNNING, candidate=proposal([1, 2]))).busy
    assert of(trial_like(4, RUNNING, candidate=proposal([1, 2]), reason="dear")).evaluate
    later = of(trial_like(6, RUNNING, candidate=proposal([1, 2])))
    assert (later.evaluate, later.waits) == (True, True)
    assert not of(trial_like(6, RUNNING, candidate=proposal([1, 1]))).waits
    # The evaluations are shared; the dense network took one.
    eight = [done(n, [n], 9.0, 0.5) for n in range(100, 108)]
    assert of(*eight).evaluate
    assert of(*eight, done(108, [8], 9.0, 0.5)).reason == "all 10 evaluations are taken"
    assert of(*eight, trial_like(4, RUNNING, candidate=proposal([1, 1]))).busy
    assert of(*eight, trial_like(6, RUNNING, candidate=proposal([1, 1]), plan={})).busy
    assert of(*eight, trial_like(6, RUNNING, candidate=proposal([1, 1]))).waits


@pytest.mark.parametrize(("left", "same"), [(9, True), (1, False), (1, True), (2, False)])
def test_in_no_order_of_their_steps_do_two_workers_evaluate_too_much(left: int, same: bool) -> None:
    """Every interleaving of two workers that write their candidates, read all, and write what they decided."""
    terms = Terms(1 + left, 8.0, 0.9, 0.01)
    wanted = {3: [1, 2], 4: [1, 2] if same else [2, 1]}
    outcomes = set()

    def follow(told: dict[int, dict[str, Any]], verdicts: dict[int, Any], depth: int) -> None:
        moves = 0
        for number, said in told.items():
            if "candidate" not in said:
                follow({**told, number: {"candidate": proposal(wanted[number])}}, verdicts, depth + 1)
            elif "plan" in said or "reason" in said:
                continue
            elif number not in verdicts or (verdicts[number].waits and depth < 9):
                trials = [trial_like(n, RUNNING, **each) for n, each in told.items()]
                follow(told, {**verdicts, number: verdict(number, wanted[number], 5.0, trials, terms)}, depth + 1)
            elif not verdicts[number].waits:
                decided = {"plan": {}} if verdicts[number].evaluate else {"reason": verdicts[number].reason}
                follow({**told, number: {**said, **decided}}, verdicts, depth + 1)
            moves += 1
        if not moves:
            outcomes.add(tuple("plan" in told[number] for number in (3, 4)))

    follow({3: {}, 4: {}}, {}, 0)
    most = 1 if same else min(2, left)
    assert outcomes
    assert {sum(each) for each in outcomes} == {most}


def test_whether_a_worker_lives() -> None:
    here = Worker.here()
    assert not here.knows_dead(here.mark)
    assert not here.knows_dead({**here.mark, "token": "another search of this process"})
    process = subprocess.Popen(["sleep", "60"])
    try:
        mark = {**here.mark, "pid": process.pid, "started": ""}
        assert not here.knows_dead(mark)
        # The same number, given to a process that began later.
        if here.started:
            assert here.knows_dead({**mark, "started": "1"})
    finally:
        process.kill()
        process.wait()
    assert here.knows_dead(mark)
    assert not here.knows_dead({**mark, "host": "another machine"})
    assert not here.knows_dead({**mark, "space": "another container"})
    assert not here.knows_dead({})


def test_trials_of_the_dead_are_queued_again_but_not_forever() -> None:
    study = optuna.create_study()
    process = subprocess.Popen(["true"])
    process.wait()
    here = Worker.here()
    dead = {**here.mark, "pid": process.pid}
    marks = {"dead": dead, "far": {**dead, "host": "another machine"}, "mine": here.mark}
    for mark in marks.values():
        trial = study.ask()
        trial.suggest_float("budget", 0.0, 1.0)
        trial.set_user_attr("worker", mark)
        trial.set_user_attr("candidate", proposal([trial.number + 1, 0]))
        trial.set_user_attr("plan", {})
    retry_dead(study, here)
    retry_dead(study, here, orphans=True)
    states = [t.state for t in study.trials]
    assert states == [TrialState.FAIL, RUNNING, RUNNING, TrialState.WAITING]
    again = study.ask()
    assert again.number == 3
    assert again.suggest_float("budget", 0.0, 1.0) == study.trials[0].params["budget"]
    assert "candidate" not in again.user_attrs
    assert "worker" not in again.user_attrs
    for count in range(1, RETRIES + 1):
        assert study.trials[-1].user_attrs["retries"] == count
        again.set_user_attr("worker", dead)
        retry_dead(study, here)
        again = study.ask()
    assert "retries" not in again.user_attrs
    retry_dead(study, here, own=True)
    assert study.trials[2].state == TrialState.FAIL
    assert study.trials[-1].user_attrs["retry_of"] == 2


@pytest.mark.parametrize(
    "sign", [("worker", {**Worker.here().mark, "token": "other"}), ("reason", "dear"), ("plan", {"layer0.weight": 0.5})]
)
def test_a_trial_that_another_worker_took_off_the_queue_is_left_to_it(sign: tuple[str, Any]) -> None:
    """Without row locks two may take one; here the other signs, or decides, later, and ends it while this one waits."""
    storage = optuna.storages.InMemoryStorage()
    ends: list[threading.Timer] = []

    def end(trial_id: int) -> None:
        storage.set_trial_user_attr(trial_id, "outcome", {"accuracy": 0.9, "drop": 0.05})
        storage.set_trial_state_values(trial_id, COMPLETE, [1.0])

    class Racing(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            if name == "budget" and not ends:
                storage.set_trial_user_attr(trial._trial_id, *sign)
                ends.append(threading.Timer(0.3, end, [trial._trial_id]))
                ends[0].start()
            return super().sample_independent(study, trial, name, distribution)

    of = space(items=3, levels=6)
    network = Network(of)
    study = optuna.create_study(storage=storage)
    terms = Terms(4, of.dense_cost, 0.95, 1e-6)
    study.sampler = Racing(seed=0)
    run = Run(study, of, network, terms, "max", Worker.here(), False, None)
    assert run.until(None, False, "") == "finished"
    assert study.trials[0].values == [1.0]
    assert ("plan" in study.trials[0].user_attrs) == (sign[0] == "plan")
    assert len(network.asked) == (2 if sign[0] == "plan" else 3)
    ends[0].join()


def test_a_trial_taken_off_the_queue_by_a_worker_that_dies_is_queued_again() -> None:
    """Both took it, and the other signed last and was killed: Optuna fails it when this one leaves it."""
    storage = optuna.storages.InMemoryStorage()
    taken: list[int] = []

    class Racing(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            if name == "budget" and not taken:
                taken.append(trial.number)
                mark = {**Worker.here().mark, "pid": 2**30, "token": "dead"}
                storage.set_trial_user_attr(trial._trial_id, "worker", mark)
            return super().sample_independent(study, trial, name, distribution)

    of = space(items=3, levels=6)
    study = optuna.create_study(storage=storage, sampler=Racing(seed=0))
    run = Run(study, of, Network(of), Terms(4, of.dense_cost, 0.95, 1e-6), "max", Worker.here(), False, None)
    assert run.until(None, False, "") == "finished"
    assert study.trials[0].state == TrialState.FAIL
    assert [t.user_attrs.get("retry_of") for t in study.trials].count(0) == 1


def test_the_end_of_a_dead_workers_trial_stops_no_search() -> None:
    """Samplers are told of it, and one of a grid stops the study after the last point: which is queued again."""
    of = space(items=3, levels=6)
    weights = {f"weight.{group}": [1.0] for group in range(of.group_count)}
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"budget": [0.4, 0.7], **weights}, seed=0))
    for killed in (study.ask(), study.ask()):
        killed.set_user_attr("worker", {**Worker.here().mark, "pid": 2**30, "token": "dead"})
        killed.suggest_float("budget", 0.0, 1.0)
        for name in weights:
            killed.suggest_float(name, LEAST, MOST, log=True)
    network = Network(of)
    run = Run(study, of, network, Terms(9, of.dense_cost, 0.95, 1e-9), "max", Worker.here(), False, None)
    run.until(None, False, "")
    assert [t.state for t in study.trials[:4]] == [TrialState.FAIL] * 2 + [COMPLETE] * 2
    assert [t.user_attrs["retry_of"] for t in study.trials[2:4]] == [0, 1]
    assert len(network.asked) == 2


def run_far_worker(storage: str, log: str) -> None:
    """A worker that seems to be on another machine, and hangs."""
    socket.gethostname = lambda: "far"
    open_as_is = open_storage(storage, heartbeat_s=1)

    def hang(number: int, candidate: Candidate) -> None:
        Path(log).write_text(json.dumps([os.getpid(), list(candidate.choices), True]) + "\n")
        time.sleep(300)

    of = space(items=3, levels=6)
    options: dict[str, Any] = {"metric": "val_acc", "mode": "max", "max_drop": 0.02, "dense_accuracy": 0.95}
    minimise(of, Network(of, before=hang), n_trials=5, storage=open_as_is, study_name="far", progress=False, **options)


def kill_far_worker(storage: str, folder: Path) -> Any:
    """What one of this machine that joins makes of it; all of its trials."""
    log = folder / "log"
    process = PROCESSES.Process(target=run_far_worker, args=(storage, str(log)), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not lines(log):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    of = space(items=3, levels=6)
    network = Network(of, before=lambda number, candidate: time.sleep(0.2))
    options: dict[str, Any] = {"metric": "val_acc", "mode": "max", "max_drop": 0.02, "dense_accuracy": 0.95}
    opened = open_storage(storage, heartbeat_s=1)
    minimise(of, network, n_trials=2, storage=opened, study_name="far", progress=False, timeout=0.0, **options)
    assert optuna.load_study(study_name="far", storage=opened).trials[0].state == TrialState.RUNNING  # it lives
    process.kill()
    process.join()
    outcome = minimise(of, network, n_trials=3, storage=opened, study_name="far", progress=False, **options)
    trials = outcome.study.trials
    release(opened)
    assert outcome.evaluations == 3
    assert trials[0].state == TrialState.FAIL
    assert trials[0].user_attrs["worker"]["host"] == "far"
    (again,) = (t for t in trials if t.user_attrs.get("retry_of") == 0)
    assert again.state == COMPLETE
    assert again.params == trials[0].params
    return trials


def test_a_missed_heartbeat_is_a_death(database: str, tmp_path: Path) -> None:
    assert kill_far_worker(database, tmp_path)[0].user_attrs["worker"]["locked"] is False


def test_a_lock_given_up_is_a_death(tmp_path: Path) -> None:
    """In another container, say, whose process numbers mean nothing here."""
    trials = kill_far_worker(f"sqlite:///{tmp_path / 'study.db'}", tmp_path)
    assert trials[0].user_attrs["worker"]["locked"] is True
    assert trials[1].user_attrs["retry_of"] == 0  # at once
    assert {path.name for path in tmp_path.iterdir()} <= {"log", "study.db", "study.db-wal", "study.db-shm"}
