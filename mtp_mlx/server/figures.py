"""What an answer took, as clients read it: usage as OpenAI's, timings as llama.cpp's, and how speculation went."""

from collections.abc import Sequence
from typing import Any

from mtp_mlx.server.asking import Task
from mtp_mlx.server.reply import Reply
from mtp_mlx.stats import Stats


def usage(replies: Sequence[Reply], task: Task) -> dict[str, Any]:
    """Tokens of all texts; a prompt counts once, however many texts follow it."""
    prompts = replies[:: task.copies]
    prompt = sum(len(reply.prompt) for reply in prompts)
    written = sum(len(reply.ids) for reply in replies)
    copied = sum(reply.stats.copied for reply in replies) if task.predicted else 0
    right = sum(reply.stats.copied_accepted for reply in replies) if task.predicted else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(reply.cached for reply in prompts)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(reply.reasoning for reply in replies),
            "accepted_prediction_tokens": right,
            "rejected_prediction_tokens": copied - right,
        },
    }


def timings(reply: Reply) -> dict[str, Any]:
    """llama.cpp's figures of one text."""
    stats = reply.stats
    read = len(reply.prompt) - reply.cached
    return {
        "cache_n": reply.cached,
        "prompt_n": read,
        "prompt_ms": 1e3 * stats.ttft_seconds,
        "prompt_per_second": read / stats.ttft_seconds if stats.ttft_seconds else 0.0,
        "predicted_n": stats.generation_tokens,
        "predicted_ms": 1e3 * stats.generation_seconds,
        "predicted_per_second": stats.generation_tps,
        "draft_n": stats.drafted,
        "draft_n_accepted": stats.accepted,
    }


def speculation(stats: Stats) -> dict[str, Any]:
    """How drafting went."""
    return {
        "depth": stats.depth,
        "reason": stats.depth_reason,
        "rounds": stats.rounds,
        "tokens_per_round": stats.tokens_per_round,
        "texts_per_round": stats.texts_per_round,
        "accepted_per_position": stats.accepted_per_position,
        "alarm": stats.alarm,
    }


def extras(reply: Reply) -> dict[str, Any]:
    """What is told beside OpenAI's fields where a text ends."""
    return {"timings": timings(reply), "speculation": speculation(reply.stats)}
