"""Serve control policies step by step, fused by one line: python examples/policy_latency.py.

Stable-Baselines3's default PPO policy (tanh) and DQN policy (relu) learn to balance gymnasium's
CartPole for some seconds. Then they act, one observation at a time, in blocks that alternate
between the policy as it is, after ``mylayers.optimize(policy)``, and ``mylayers.freeze`` of its
layers, which goes from the environment's NumPy observation to scores, on the same episodes. Exits
non-zero if two of them choose different actions for the same observation, other than between
scores that are equal but for rounding.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

import mylayers

SEED = 0
BLOCK = 250  # steps served before the other takes its turn
EPISODES = 5  # that a policy is judged by
ROUNDING = 1e-5  # of the largest score: a hundred times the last bit of a float32
OUT = Path(__file__).resolve().parent.parent / "out"

Network = Callable[[Tensor], Tensor]
WAYS = {"stock": "C1", "optimized": "C0", "frozen": "C2"}  # to serve a policy; colours


class Block(NamedTuple):
    """What one turn of serving gave: seconds of each action, and of all with the environment's."""

    predict: list[float]
    network: list[float]
    acting: float
    observations: list[np.ndarray]


Served = dict[str, list[Block]]  # by way, on the same episodes


class Agreement(NamedTuple):
    """How many observations lead to the same action, to a tie, to another action."""

    same: int
    ties: int
    different: int
    distance: float  # between two scores, at most

    def __str__(self) -> str:
        """For people."""
        total = self.same + self.ties + self.different
        return (
            f"{self.same} of {total} actions agree, {self.ties} ties; the scores lie apart by "
            f"{self.distance:.1e} at most."
        )


def ppo(env: gymnasium.Env) -> BaseAlgorithm:
    """PPO with all its defaults."""
    return PPO("MlpPolicy", env, seed=SEED, device="cpu")


def dqn(env: gymnasium.Env) -> BaseAlgorithm:
    """DQN's default policy, trained in larger portions than by default, to learn in seconds."""
    return DQN(
        "MlpPolicy",
        env,
        learning_rate=2.3e-3,
        batch_size=64,
        learning_starts=1000,
        target_update_interval=10,
        train_freq=256,
        gradient_steps=128,
        exploration_fraction=0.2,
        exploration_final_eps=0.04,
        seed=SEED,
        device="cpu",
    )


def ppo_network(policy: BasePolicy) -> Network:
    """From an observation to the logits, which the fused part and a lone layer compute."""
    return lambda x: policy.action_net(policy.mlp_extractor.policy_net(x))


def dqn_network(policy: BasePolicy) -> Network:
    """From an observation to the value of each action, all of it fused."""
    return policy.q_net.q_net


def ppo_layers(policy: BasePolicy) -> nn.Module:
    """What ``mylayers.freeze`` takes: the same as one module."""
    return nn.Sequential(policy.mlp_extractor.policy_net, policy.action_net)


POLICIES = {
    "PPO, tanh": (ppo, ppo_network, ppo_layers),
    "DQN, relu": (dqn, dqn_network, dqn_network),
}


class Advance(BaseCallback):
    """Moves a progress bar while an algorithm learns."""

    def __init__(self, progress: Progress, task: int) -> None:
        super().__init__()
        self.progress, self.task = progress, task

    def _on_step(self) -> bool:
        if self.num_timesteps % 500 == 0:
            self.progress.update(self.task, completed=self.num_timesteps, refresh=True)
        return True


def learn(make: Callable[[gymnasium.Env], BaseAlgorithm], steps: int, bar: Progress) -> BasePolicy:
    """A policy that was trained for some steps."""
    algorithm = make(gymnasium.make("CartPole-v1"))
    task = bar.add_task(f"training {type(algorithm).__name__}", total=steps)
    algorithm.learn(steps, callback=Advance(bar, task))
    bar.update(task, completed=steps, refresh=True)
    return algorithm.policy


def balances(policy: BasePolicy) -> float:
    """How many steps it keeps the pole up, of 500 at most."""
    env, steps = gymnasium.make("CartPole-v1"), 0
    for episode in range(EPISODES):
        observation, _ = env.reset(seed=episode)
        done = False
        while not done:
            action, _ = policy.predict(observation, deterministic=True)
            observation, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            steps += 1
    return steps / EPISODES


def served_by(policy: BasePolicy) -> Callable[[np.ndarray], int]:
    """An action for an observation, as users of Stable-Baselines3 get it."""
    return lambda observation: policy.predict(observation, deterministic=True)[0]


def served_by_frozen(frozen: mylayers.Frozen) -> Callable[[np.ndarray], int]:
    """The same action: that of the highest score."""
    return lambda observation: int(frozen(observation).argmax())


@torch.no_grad()
def act(
    decide: Callable[[np.ndarray], int],
    network: Callable,
    env: gymnasium.Env,
    steps: int,
    seed: int,
) -> Block:
    """Serve a block of steps, then time the network alone on the observations that came up."""
    clock = time.perf_counter
    predict, observations = [], []
    observation, _ = env.reset(seed=seed)
    start = clock()
    for _ in range(steps):
        before = clock()
        action = decide(observation)
        predict.append(clock() - before)
        observations.append(observation)
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            observation, _ = env.reset()
    acting = clock() - start

    alone = []
    for x in [torch.from_numpy(observation)[None] for observation in observations]:
        before = clock()
        network(x)
        alone.append(clock() - before)
    return Block(predict, alone, acting, observations)


def serve(
    policy: BasePolicy, network: Network, layers: nn.Module, blocks: int, bar: Progress, name: str
) -> Served:
    """All in turns, in an order that turns round; they act in the same episodes."""
    env = gymnasium.make("CartPole-v1")
    frozen = mylayers.freeze(layers)
    served: Served = {way: [] for way in WAYS}

    def turn(way: str, seed: int) -> Block:
        if way == "frozen":
            return act(served_by_frozen(frozen), frozen, env, BLOCK, seed)
        (mylayers.optimize if way == "optimized" else mylayers.restore)(policy)
        return act(served_by(policy), network, env, BLOCK, seed)

    for way in WAYS:  # warms all up
        turn(way, SEED)
    order = list(WAYS)
    for block in bar.track(range(blocks), description=f"serving {name}"):
        for way in order:
            served[way].append(turn(way, SEED + block))
        order.reverse()
        bar.refresh()
    return served


@torch.no_grad()
def decide(
    policy: BasePolicy, network: Network, observations: list[np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Its action for each observation, and the network's scores of all actions."""
    actions = [int(policy.predict(o, deterministic=True)[0]) for o in observations]
    scores = [network(torch.from_numpy(o)[None]) for o in observations]
    return torch.tensor(actions), torch.cat(scores)


def compare(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], rounding: float = ROUNDING
) -> Agreement:
    """Actions and scores on the same observations, side by side."""
    actions, scores = before
    best, second = scores.double().topk(2, dim=1).values.T
    tie = best - second <= rounding * scores.abs().amax(1)
    differ = actions != after[0]
    return Agreement(
        same=int((~differ).sum()),
        ties=int((differ & tie).sum()),
        different=int((differ & ~tie).sum()),
        distance=(scores - after[1]).abs().max().item(),
    )


@torch.no_grad()
def decide_frozen(layers: nn.Module, observations: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The same of the frozen layers."""
    frozen = mylayers.freeze(layers)
    scores = torch.from_numpy(np.stack([frozen(o) for o in observations]))
    return scores.argmax(1), scores


def agreement(
    policy: BasePolicy, network: Network, layers: nn.Module, observations: list[np.ndarray]
) -> dict[str, Agreement]:
    """Whether the policy decides as before, after ``mylayers.optimize`` and when it is frozen."""
    mylayers.restore(policy)
    before = decide(policy, network, observations)
    mylayers.optimize(policy)
    return {
        "optimized": compare(before, decide(policy, network, observations)),
        "frozen": compare(before, decide_frozen(layers, observations)),
    }


def percentile(seconds: list[float], percent: float) -> float:
    """In microseconds."""
    return 1e6 * float(np.percentile(seconds, percent))


def all_of(blocks: list[Block], what: str) -> list[float]:
    """The seconds of every step of some blocks."""
    return [seconds for block in blocks for seconds in getattr(block, what)]


def report(name: str, served: Served) -> Table:
    """All side by side."""
    table = Table(title=f"{name}: {len(served['stock']) * BLOCK} steps each, in turns")
    others = [way for way in WAYS if way != "stock"]
    for column in ("", *WAYS, *(f"{way}, speed-up" for way in others)):
        table.add_column(column, justify="right" if column else "left")

    def add(label: str, figure: Callable[[list[Block]], float], form: str, *, rate: bool) -> None:
        def spread(way: str) -> str:
            pairs = zip(served["stock"], served[way], strict=True)
            ratios = [figure([a]) / figure([b]) for a, b in pairs]
            if rate:
                ratios = [1 / ratio for ratio in ratios]
            low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
            return f"{ratio:.2f} ({low:.2f} to {high:.2f})"

        figures = [format(figure(served[way]), form) for way in WAYS]
        table.add_row(label, *figures, *map(spread, others))

    for what, label in (("predict", "an action"), ("network", "network alone")):
        for percent in (50, 99):
            add(
                f"{label}, p{percent} µs",
                lambda blocks, w=what, p=percent: percentile(all_of(blocks, w), p),
                ".1f",
                rate=False,
            )
    for what, label in (("predict", "actions"), ("network", "network alone")):
        add(
            f"{label}, a second",
            lambda blocks, w=what: 1 / statistics.fmean(all_of(blocks, w)),
            ",.0f",
            rate=True,
        )
    add(
        "acting in CartPole, a second",
        lambda blocks: len(blocks) * BLOCK / sum(block.acting for block in blocks),
        ",.0f",
        rate=True,
    )
    return table


def share_line(served: Served) -> str:
    """What part of a prediction the network is."""
    stock, optimized = (
        percentile(all_of(served[way], "network"), 50)
        / percentile(all_of(served[way], "predict"), 50)
        for way in ("stock", "optimized")
    )
    return (
        f"The network is {stock:.0%} of policy.predict as it is and {optimized:.0%} optimized; the "
        "rest is Python around it: checks, conversions, distributions. Frozen layers are called "
        "without policy.predict."
    )


def draw(path: Path, results: dict[str, Served]) -> None:
    """How many steps take no longer than a time: predictions, and the network alone."""
    figure = Figure(figsize=(5 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for panel, (name, served) in zip(panels, results.items(), strict=True):
        for what, style in (("predict", "-"), ("network", "--")):
            for way, color in WAYS.items():
                seconds = np.sort(all_of(served[way], what)) * 1e6
                share = np.arange(1, len(seconds) + 1) / len(seconds)
                panel.plot(seconds, share, style, color=color, label=f"{what}, {way}")
        panel.set(title=name, xlabel="µs a step", xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of the steps that take no longer")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def progress_bar(console: Console) -> Progress:
    """A bar that moves between the turns, with no thread of its own beside what is timed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
    )


def run(steps: int, training_steps: int, out: Path, console: Console) -> list[str]:
    """The whole example; returns what went wrong."""
    torch.set_num_threads(1)  # one row of such a network gives a second one nothing to do
    out.mkdir(parents=True, exist_ok=True)
    blocks = max(2, steps // BLOCK)  # of fewer there are no quartiles
    results, problems = {}, []
    for name, (make, network_of, layers_of) in POLICIES.items():
        with progress_bar(console) as bar:
            policy = learn(make, training_steps, bar)
        console.print(f"It balances the pole for {balances(policy):.0f} of 500 steps.")
        console.print(str(mylayers.optimize(policy)), markup=False)
        network, layers = network_of(policy), layers_of(policy)
        console.print(str(mylayers.freeze(layers)), markup=False)
        with progress_bar(console) as bar:
            served = results[name] = serve(policy, network, layers, blocks, bar, name)
        console.print(report(name, served))
        console.print(share_line(served))
        observations = [o for block in served["stock"] for o in block.observations]
        for way, found in agreement(policy, network, layers, observations).items():
            console.print(f"{way}: {found}")
            if found.different:
                problems.append(f"{name}, {way}: {found.different} actions differ")
        console.print()
    picture = out / "policy_latency.png"
    draw(picture, results)
    console.print(f"Latencies: {picture}", markup=False)
    return problems


def count(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; got {text!r}")
    return int(text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps",
        type=count,
        default=5000,
        help=f"served each way, in blocks of {BLOCK}, two at least; default: %(default)s",
    )
    parser.add_argument("--training-steps", type=count, default=12_000, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the plot; default: out/")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    problems = run(arguments.steps, arguments.training_steps, arguments.out, console)
    for problem in problems:
        console.print(f"Failed: {problem}", style="bold red", markup=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
