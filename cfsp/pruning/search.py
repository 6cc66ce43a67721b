"""Evolutionary search over widths: exchanges between FFNs that keep the cost, judged by a loss."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EXCHANGE_FRACTION = 32
"""The smallest exchange is about this part of the smallest FFN, or one multiple."""
EXCHANGE_SIZES = (1, 2, 4)
"""Smallest exchanges that one exchange comes to."""
MOST_EXCHANGES = 3
"""Between a parent and its offspring."""
ATTEMPTS = 50
"""At an offspring that was not measured before."""


@dataclass(frozen=True)
class SearchResult:
    """The best widths that were found."""

    widths: tuple[int, ...]
    loss: float
    start_loss: float
    evaluations: int


def search_widths(
    evaluate: Callable[[tuple[int, ...]], float],
    start: Sequence[int],
    sizes: Sequence[int],
    multiple: int,
    *,
    costs: Sequence[int] | None = None,
    generations: int = 20,
    offspring: int = 4,
    seed: int = 0,
) -> SearchResult:
    """Improve widths by moving channels between FFNs at constant cost.

    Each generation makes offspring of the best widths so far, by one to three random exchanges,
    fewer being likelier, and keeps the best of all. No widths are measured twice. Source: the
    level-switch mutation of EvoPress (arXiv 2410.14649), here with a (1 + offspring) strategy.

    Args:
        evaluate: widths -> loss; NaN counts as infinite. Called at most
            ``1 + generations * offspring`` times.
        start: width of every FFN, a multiple each.
        sizes: channels of every FFN.
        multiple: of all widths.
        costs: of one channel of width in every FFN; None: 1. What ``start`` costs is kept exactly.
        generations: rounds.
        offspring: candidates of a round.
        seed: of the exchanges; the same arguments give the same calls and the same result.
    """
    exchange = _Exchange(tuple(sizes), multiple, tuple(costs or [1] * len(sizes)))
    generator = random.Random(seed)
    best = tuple(start)
    losses = {best: _finite(evaluate(best))}
    start_loss = losses[best]
    for _ in range(generations):
        parent = best
        for _ in range(offspring):
            child = _new_child(exchange, parent, generator, losses)
            if child is None:
                break
            losses[child] = _finite(evaluate(child))
            if losses[child] < losses[best]:
                best = child
    return SearchResult(best, losses[best], start_loss, len(losses))


def _finite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


@dataclass(frozen=True)
class _Exchange:
    """Moves of width between two FFNs that keep what all cost."""

    sizes: tuple[int, ...]
    multiple: int
    costs: tuple[int, ...]

    def __call__(self, widths: tuple[int, ...], generator: random.Random) -> tuple[int, ...] | None:
        """Widths after one random exchange; None where the pair drawn has no room for it."""
        if len(widths) < 2:
            return None
        giver, taker = generator.sample(range(len(widths)), 2)
        least = max(1, min(self.sizes) // self.multiple // EXCHANGE_FRACTION) * self.multiple
        shared = math.lcm(self.costs[giver], self.costs[taker])
        amount = least * generator.choice(EXCHANGE_SIZES)
        changed = list(widths)
        changed[giver] -= amount * (shared // self.costs[giver])
        changed[taker] += amount * (shared // self.costs[taker])
        room = self.sizes[taker] // self.multiple * self.multiple
        if changed[giver] < self.multiple or changed[taker] > room:
            return None
        return tuple(changed)


def _new_child(
    exchange: _Exchange,
    parent: tuple[int, ...],
    generator: random.Random,
    known: dict[tuple[int, ...], float],
) -> tuple[int, ...] | None:
    """Widths a few exchanges away that were not measured yet; None where none was met."""
    for _ in range(ATTEMPTS):
        child = parent
        for _ in range(min(generator.randint(1, MOST_EXCHANGES) for _ in range(2))):
            child = exchange(child, generator) or child
        if child not in known:
            return child
    return None
