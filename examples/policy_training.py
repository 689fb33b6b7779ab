"""Train control policies, made faster by one line: python examples/policy_training.py.

Stable-Baselines3's PPO, DQN, SAC and TD3, with all their defaults, learn gymnasium's CartPole
(PPO, DQN) and Pendulum (SAC, TD3), each as its users write it and after ``optimize(algorithm)``,
which fuses the policy's networks and its optimisers. Whole runs in turns, from the same seeds:
seconds to the end, and the reward of the policy that was learned. The two ways round differently,
so they learn from different episodes after a while; how well is a matter of chance, how fast is
not.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from policy_latency import count, progress_bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from torch.optim import Optimizer

import mylayers

OUT = Path(__file__).resolve().parent.parent / "out"
EPISODES = 10  # that a policy is judged by


class Task(NamedTuple):
    """What an algorithm learns, and for how many steps by default."""

    algorithm: type[BaseAlgorithm]
    environment: str
    steps: int


TASKS = {
    "PPO": Task(PPO, "CartPole-v1", 20_000),
    "DQN": Task(DQN, "CartPole-v1", 20_000),
    "SAC": Task(SAC, "Pendulum-v1", 4000),
    "TD3": Task(TD3, "Pendulum-v1", 4000),
}


def optimizers_of(algorithm: BaseAlgorithm) -> list[Optimizer]:
    """The policy's, its actor's and critic's, and the algorithm's own."""
    owners = (algorithm, *algorithm.policy.modules())
    found = (value for owner in owners for value in vars(owner).values())
    return [value for value in found if isinstance(value, Optimizer)]


def optimize(algorithm: BaseAlgorithm) -> mylayers.Report:
    """The one line: all networks of a policy, and all optimisers that train it."""
    reports = [mylayers.optimize(algorithm.policy, each) for each in optimizers_of(algorithm)]
    return reports[-1]


class Run(NamedTuple):
    """A whole run: seconds to its end, the reward of what it learned, and the way there."""

    seconds: float
    reward: float
    curve: list[tuple[float, float]]  # seconds, mean reward of the last episodes


class Watch(BaseCallback):
    """Moves a progress bar and notes how an algorithm learns."""

    def __init__(self, progress: Progress, task: int) -> None:
        super().__init__()
        self.progress, self.task = progress, task
        self.curve: list[tuple[float, float]] = []
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps % 200 == 0:
            self.progress.update(self.task, advance=200, refresh=True)
            if episodes := self.model.ep_info_buffer:
                reward = statistics.fmean(episode["r"] for episode in episodes)
                self.curve.append((time.perf_counter() - self.start, reward))
        return True


def learn(task: Task, steps: int, seed: int, bar: Progress, row: int, *, fused: bool) -> Run:
    """One whole run."""
    algorithm = task.algorithm("MlpPolicy", task.environment, seed=seed, device="cpu")
    if fused:
        optimize(algorithm)
    watch = Watch(bar, row)
    start = time.perf_counter()
    algorithm.learn(steps, callback=watch)
    seconds = time.perf_counter() - start
    reward, _ = evaluate_policy(algorithm.policy, algorithm.get_env(), EPISODES)
    return Run(seconds, float(reward), watch.curve)


def compare(name: str, steps: int, runs: int, bar: Progress) -> dict[bool, list[Run]]:
    """Runs of an algorithm both ways, in turns, whose order turns round."""
    row = bar.add_task(name, total=2 * runs * steps)
    found: dict[bool, list[Run]] = {False: [], True: []}
    for seed in range(runs):
        for fused in (False, True) if seed % 2 == 0 else (True, False):
            found[fused].append(learn(TASKS[name], steps, seed, bar, row, fused=fused))
    bar.update(row, completed=2 * runs * steps, refresh=True)
    return found


def report(results: dict[str, dict[bool, list[Run]]], steps: dict[str, int]) -> Table:
    """Both ways side by side."""
    table = Table(title="Whole runs in turns, stock and then optimized; medians, one thread")
    for column in ("", "steps", "stock, s", "then, s", "speed-up", "of", "reward", "then"):
        table.add_column(column, justify="right" if column else "left")
    for name, ways in results.items():
        pairs = zip(ways[False], ways[True], strict=True)
        speed_ups = [stock.seconds / fused.seconds for stock, fused in pairs]
        seconds, rewards = (
            [statistics.median(getattr(run, what) for run in ways[way]) for way in (False, True)]
            for what in ("seconds", "reward")
        )
        table.add_row(
            name,
            f"{steps[name]:,}",
            *(f"{s:.1f}" for s in seconds),
            f"{statistics.median(speed_ups):.2f}",
            f"{min(speed_ups):.2f} to {max(speed_ups):.2f}",
            *(f"{reward:.0f}" for reward in rewards),
        )
    return table


def draw(path: Path, results: dict[str, dict[bool, list[Run]]]) -> None:
    """How the reward grows with the seconds, both ways."""
    figure = Figure(figsize=(4 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (name, ways) in zip(panels, results.items(), strict=True):
        for fused, label, color in ((False, "stock", "C1"), (True, "optimized", "C0")):
            for number, run in enumerate(ways[fused]):
                seconds, rewards = [list(axis) for axis in zip(*run.curve, strict=True)] or ([], [])
                panel.plot(seconds, rewards, color=color, label=None if number else label)
                panel.axvline(run.seconds, color=color, linestyle=":")
        panel.set(title=f"{name}, {TASKS[name].environment}", xlabel="seconds")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean reward of the last episodes")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def run(names: list[str], steps: int | None, runs: int, out: Path, console: Console) -> None:
    """The whole example."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    lengths = {name: steps or TASKS[name].steps for name in names}
    for name in names:
        fresh = TASKS[name].algorithm("MlpPolicy", TASKS[name].environment, device="cpu")
        console.print(f"{name}:\n{optimize(fresh)}\n", markup=False)
    with progress_bar(console) as bar:
        results = {name: compare(name, lengths[name], runs, bar) for name in names}
    console.print(report(results, lengths))
    picture = out / "policy_training.png"
    draw(picture, results)
    console.print(f"Learning curves: {picture}", markup=False)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--algorithms", nargs="+", choices=TASKS, default=list(TASKS), help="default: all"
    )
    parser.add_argument("--steps", type=count, help="of a run; default: an algorithm's own")
    parser.add_argument("--runs", type=count, default=3, help="each way; default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the plot; default: out/")
    given = parser.parse_args()
    run(given.algorithms, given.steps, given.runs, given.out, Console(soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
