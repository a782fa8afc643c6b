"""`Usage`: whether a replica has worked since it was last asked."""

from __future__ import annotations

import pytest

from remote_vae_serve.replica.usage import Usage


def test_what_came_and_went_between_two_questions_counts_once() -> None:
    usage = Usage()
    assert usage.since_last() == 0
    with usage.request():
        pass
    assert [usage.since_last(), usage.since_last()] == [1, 0]


def test_what_still_runs_counts_at_every_question_also_beside_what_failed() -> None:
    usage = Usage()
    with usage.request():
        with pytest.raises(ValueError, match="no latents"), usage.request():
            raise ValueError("no latents")
        assert [usage.since_last(), usage.since_last()] == [1, 1]
    assert usage.since_last() == 0
