"""Counters that agree with what was answered."""

from prometheus_client.parser import text_string_to_metric_families
from served import USER, serving


def _values(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"|{value}" for value in dict(sorted(sample.labels.items())).values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_are_the_sums_of_what_answers_say() -> None:
    with serving() as (client, engine):
        engine.script = "One two three four five six seven."
        prompts = written = cached = drafted = accepted = 0
        for _ in range(2):
            body = client.post(
                "/v1/chat/completions",
                json={
                    "messages": USER, "reasoning_effort": "none", "depth": 2,
                    "prediction": {"type": "content", "content": engine.script},
                },
            ).json()  # fmt: skip
            prompts += body["usage"]["prompt_tokens"]
            cached += body["usage"]["prompt_tokens_details"]["cached_tokens"]
            written += body["usage"]["completion_tokens"]
            drafted += body["timings"]["draft_n"]
            accepted += body["timings"]["draft_n_accepted"]
        client.get("/some/path")
        values = _values(client.get("/metrics").text)
        assert cached > 0 and accepted > 0
        assert values["mtp_mlx_prompt_tokens_total"] == prompts
        assert values["mtp_mlx_prompt_tokens_cached_total"] == cached
        assert values["mtp_mlx_generation_tokens_total"] == written
        assert values["mtp_mlx_spec_decode_num_draft_tokens_total"] == drafted
        assert values["mtp_mlx_spec_decode_num_accepted_tokens_total"] == accepted
        assert values["mtp_mlx_requests_total|ok|/v1/chat/completions"] == 2
        assert values["mtp_mlx_requests_total|refused|other"] == 1
        assert values["mtp_mlx_time_to_first_token_seconds_count"] == 2
        assert values["mtp_mlx_time_per_output_token_seconds_count"] == 2
        assert values["mtp_mlx_requests_live"] == values["mtp_mlx_requests_waiting"] == 0
        assert values["mtp_mlx_prompt_cache_bytes"] > 0 and values["mtp_mlx_prompt_cache_queries"] == 2


def test_paths_that_are_no_route_share_a_counter() -> None:
    with serving() as (client, _):
        for number in range(50):
            client.get(f"/{number}")
        assert client.get("/metrics").text.count("mtp_mlx_requests_total{") <= 2
