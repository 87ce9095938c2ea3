"""What a found assignment stands beside: the published hybrid, first and last blocks high, random assignments."""

import numpy as np

from allocation.assignment import fill, least, random_choice, total
from common.statistics import METRICS, compare, with_interval
from models.bit_config import block_of


def hybrid(high, low):
    """The published hybrid (configs/hybrid_25pct_4bit.json, 12 blocks) by fraction of the blocks, for any depth.

    At low bits: attn.c_proj of the first third, the MLP of the twelfth from 9/12 on, all of the last sixth; each
    rounded, one block at least. 25 % of the weights where 12 divides the number of blocks.
    Args: high, low: resolved configs. Returns: a resolved config.
    """
    blocks = 1 + max(map(block_of, high))
    third, last = max(1, round(blocks / 3)), blocks - max(1, round(blocks / 6))
    start = 9 * blocks // 12
    middle = range(start, max(start + 1, last))

    def is_low(layer):
        block = block_of(layer)
        in_first = block < third and layer.endswith("attn.c_proj")
        return in_first or (block in middle and ".mlp." in layer) or block >= last

    return {layer: (low if is_low(layer) else high)[layer] for layer in high}


def first_and_last_high(layers, resource, limit):
    """The choice with the outermost blocks high: least bits everywhere, then each linear of block 0, of the last
    block, and so on inwards, takes the most that fits."""
    blocks = 1 + max(map(block_of, layers))
    order = sorted(range(len(layers)), key=lambda at: _from_outside(block_of(layers[at]), blocks))
    return fill(least(resource, limit), resource, limit, order)


def _from_outside(block, blocks):
    """Rank of a block in the order 0, last, 1, last but one, ..."""
    return min(2 * block, 2 * (blocks - 1 - block) + 1)


def random_like(choice, resource, rng, tries=100):
    """A random choice with the resources of `choice` as limits; the fullest of `tries` where none takes them all."""
    limit = total(resource, choice)
    best = None
    for _ in range(tries):
        drawn = random_choice(resource, limit, rng)
        used = (total(resource, drawn) / limit).sum()
        if best is None or used > best[0]:
            best = used, drawn
        if used == len(limit):
            break
    return best[1]


def contrast(scores, found, num_bootstrap, seed):
    """How the random assignments of a budget do beside the found one, on the same questions.

    Args: scores: {config: (questions, 2) exact match and F1} of both. found: its key.
    Returns: "number"; mean and standard deviation of the random ones; `better_than_found`: those of higher EM;
        per metric: in how many the found one is better, equal, or worse, in how many it is better with a paired 95 %
        interval above zero, and its paired difference from their mean (points) with interval.
    """
    mean = np.mean([values for name, values in scores.items() if name != found], axis=0)
    rows = compare({**scores, "mean": mean}, found, num_bootstrap, seed)
    average = rows.pop("mean")
    rows.pop(found)
    result = {"number": len(rows)}
    for metric in METRICS:
        values, gains = ([row[key] for row in rows.values()] for key in (metric, f"{metric}_drop"))
        lows = [row[f"{metric}_drop_interval"][0] for row in rows.values() if row[f"{metric}_drop_interval"]]
        result[f"mean_{metric}"] = float(np.mean(values))
        result[f"std_{metric}"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        result[metric] = {
            "found_better": sum(gain > 0 for gain in gains),
            "equal": sum(gain == 0 for gain in gains),
            "random_better": sum(gain < 0 for gain in gains),
            "found_better_interval_above_zero": sum(low > 0 for low in lows) if num_bootstrap else None,
            "found_minus_mean": float(np.mean(gains)),
            "found_minus_mean_interval": average[f"{metric}_drop_interval"],
        }
    result["better_than_found"] = result["exact_match"]["random_better"]
    return result


def contrast_line(name, result):
    """What the search prints of `contrast`."""
    number, parts = result["number"], []
    for metric, short in zip(METRICS, ("EM", "F1"), strict=True):
        row = result[metric]
        above = row["found_better_interval_above_zero"]
        sure = "" if above is None else f", in {above} with a 95 % interval above 0"
        gain = with_interval(row["found_minus_mean"], row["found_minus_mean_interval"])
        counts = f"better than {row['found_better']} of {number} (equal {row['equal']}{sure})"
        parts.append(f"{short}: {counts}, minus their mean {gain}")
    return f"{name} against random assignments of its budget, the same questions: {'; '.join(parts)}"
