"""Whole conversations by hand: the tokens of both views, spans, rewards, references and what learning gets of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coars_fast.config import GameConfig
from coars_fast.data.records import TrainedTurn
from coars_fast.game.episode import RECOMMENDER, USER, Episode, Reply, Span, judgement_prompt
from coars_fast.game.prompts import FULL
from coars_fast.game.trajectory import balance, reason_length, trajectories
from tests.game_pieces import TASK, TITLES, an_episode, family, judge, recommend, say, spelled

GAME = GameConfig(max_turns=2)
CODEC, TEMPLATE = family("chatml")
START, END = CODEC.vocab["<|im_start|>"], CODEC.vocab["<|im_end|>"]
ENDOFTEXT = CODEC.vocab["<|endoftext|>"]


def text(words: str) -> list[int]:
    return CODEC.encode(words)


def message(role: str, ids: list[int]) -> list[int]:
    """ChatML as its publishers write it: `<|im_start|>role\\n ... <|im_end|>\\n`."""
    return [START, *text(f"{role}\n"), *ids, END, *text("\n")]


ASK = [START, *text("assistant\n")]
REC_OPENING = [
    *message("system", text("Recommend one item.")),
    *message("user", text("History: Alpha; Beta\nCandidates: Gamma; Delta; Omega")),
]
USER_OPENING = message("system", text("Judge the item.\nHistory: Alpha; Beta"))


def play(episode: Episode, *replies: str | Reply) -> list[Reply]:
    given = [say(episode, reply) if isinstance(reply, str) else reply for reply in replies]
    for reply in given:
        episode.receive(reply)
    return given


def two_turns(game: GameConfig = GAME) -> tuple[Episode, list[Reply]]:
    """A wrong item that the user accepts, then the right one, clicked."""
    episode = an_episode(game)
    replies = play(episode, recommend("Gamma"), judge("star", "0.60"), recommend("Delta"), judge("click", "0.90"))
    return episode, replies


def test_a_new_episode_waits_for_the_recommender_and_has_told_the_user_no_more_than_the_history() -> None:
    episode = an_episode(GAME)
    assert episode.waiting == RECOMMENDER
    assert episode.views[RECOMMENDER].tokens == [*REC_OPENING, *ASK]
    assert episode.views[USER].tokens == USER_OPENING


def test_tokens_of_both_views_after_two_turns() -> None:
    episode, replies = two_turns()
    rec_1, user_1, rec_2, user_2 = (list(reply.ids[:-1]) for reply in replies)
    assert rec_1 != text(recommend("Gamma")), "the replies are spelled in tokens that encode() would not choose"
    assert episode.views[RECOMMENDER].tokens == [
        *REC_OPENING,
        *ASK, *rec_1, END, *text("\n"),
        *message("user", user_1),
        *ASK, *rec_2, END, *text("\n"),
    ]  # fmt: skip
    assert episode.views[USER].tokens == [
        *USER_OPENING,
        *message("user", [*rec_1, *text("\nPeers: 1 of 5")]),
        *ASK, *user_1, END, *text("\n"),
        *message("user", [*rec_2, *text("\nPeers: 4 of 5")]),
        *ASK, *user_2, END, *text("\n"),
    ]  # fmt: skip
    assert episode.waiting is None


def test_spans_hold_the_replies_and_fork_before_their_header() -> None:
    episode, (rec_1, user_1, rec_2, user_2) = two_turns()
    first = len(REC_OPENING)
    start = first + len(ASK)
    second = start + len(rec_1.ids) + len(text("\n")) + len(message("user", list(user_1.ids[:-1])))
    assert episode.views[RECOMMENDER].spans == [
        Span(first, start, start + len(rec_1.ids)),
        Span(second, second + len(ASK), second + len(ASK) + len(rec_2.ids)),
    ]
    for agent, replies in ((RECOMMENDER, (rec_1, rec_2)), (USER, (user_1, user_2))):
        view = episode.views[agent]
        assert [tuple(view.tokens[span.start : span.end]) for span in view.spans] == [reply.ids for reply in replies]
        assert all(view.tokens[span.fork : span.start] == ASK for span in view.spans)
        assert view.logp == [logp for reply in replies for logp in reply.logp]


def test_turns_say_what_happened() -> None:
    episode, _ = two_turns()
    first, second = episode.turns
    assert (first.number, first.item, first.hit, first.user_spoke) == (1, 2, False, True)
    assert (second.number, second.item, second.hit, second.user_spoke) == (2, 3, True, True)
    assert first.rec_text == recommend("Gamma") and first.user_text == judge("star", "0.60")
    assert first.judgement is not None and (first.judgement.action, first.judgement.score) == ("star", 0.6)


def test_rewards_of_the_two_turns() -> None:
    first, second = (turn.reward for turn in two_turns()[0].turns)
    assert first is not None and second is not None
    # Turn 1, miss, s = .6, q = .5: accepted, so the recommender's is left out; -.2 * (1 - .1 * .5 * .2) = -.198
    assert (first.rec, first.user, first.excluded) == (None, pytest.approx(-0.198), True)
    # Turn 2 of 2, hit, s = .9: D = .5, .95 * .5 = .475; .8 * (1 - .1 * .5 * .8) = .768
    assert (second.rec, second.user, second.excluded) == (pytest.approx(0.475), pytest.approx(0.768), False)


def test_trajectories_hold_views_rewards_weights_and_references() -> None:
    episode, replies = two_turns()
    rec, user = trajectories([episode], GAME)
    notes = {
        RECOMMENDER: ("Note: wrong, the user took Delta", "Note: right, the user took Delta"),
        USER: ("Note: the user did not take Gamma, so dislike.", "Note: the user took Delta, so click."),
    }
    expected = {RECOMMENDER: ((0.0, 0.0), (0.475, 1.0)), USER: ((-0.198, 1.0), (0.768, 1.0))}
    reason = {RECOMMENDER: "Reason: try it.\n", USER: "Reason: so it is.\n"}
    for trajectory in (rec, user):
        agent, view = trajectory.agent, episode.views[trajectory.agent]
        assert trajectory.episode == 0
        assert list(trajectory.tokens) == view.tokens and list(trajectory.behaviour_logp) == view.logp
        assert trajectory.turns == tuple(
            TrainedTurn(
                fork=span.fork, start=span.start, end=span.end, reward=pytest.approx(reward), weight=weight,  # pyright: ignore
                reference=(*message("system", text(note)), *ASK), reason=len(spelled(CODEC, reason[agent])),
            )
            for span, (reward, weight), note in zip(view.spans, expected[agent], notes[agent], strict=True)
        )  # fmt: skip
    assert (rec.agent, user.agent) == (RECOMMENDER, USER)
    assert len(rec.behaviour_logp) == len(replies[0].ids) + len(replies[2].ids)


def test_hits_and_misses_of_the_user_count_equally_over_the_batch() -> None:
    missed = an_episode(GAME)
    play(missed, recommend("Gamma"), judge("skip", "0.30"), recommend("Omega"), judge("dislike", "0.10"))
    batch = [two_turns()[0], missed]
    weights = [[t.weight for t in x.turns] for x in trajectories(batch, GAME) if x.agent == USER]
    # One hit and three misses: 4 / (2 * 1) and 4 / (2 * 3); together 2 and 2.
    assert weights == [[pytest.approx(2 / 3), 2.0], [pytest.approx(2 / 3), pytest.approx(2 / 3)]]
    # The recommender's are not balanced, only its accepted miss is left out.
    weights = [[t.weight for t in x.turns] for x in trajectories(batch, GAME) if x.agent == RECOMMENDER]
    assert weights == [[0.0, 1.0], [1.0, 1.0]]


def test_turns_excluded_for_both_take_no_part_in_the_balance() -> None:
    game = GameConfig(max_turns=2, exclude_accepted_misses="both")
    missed = an_episode(game)
    play(missed, recommend("Gamma"), judge("skip", "0.30"), recommend("Omega"), judge("dislike", "0.10"))
    weights = [[t.weight for t in x.turns] for x in trajectories([two_turns(game)[0], missed], game) if x.agent == USER]
    # Learned from: one hit and two misses, 3 / (2 * 1) and 3 / (2 * 2).
    assert weights == [[0.0, 1.5], [0.75, 0.75]]


def test_without_balance_every_turn_of_the_user_weighs_one() -> None:
    game = GameConfig(max_turns=2, balance_user_turns=False)
    rec, user = trajectories([two_turns(game)[0]], game)
    assert [turn.weight for turn in user.turns] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("hits", "weights"),
    [
        ([], []),
        ([True], [1.0]),
        ([False, False], [1.0, 1.0]),
        ([True, False, False, False], [2.0, 2 / 3, 2 / 3, 2 / 3]),
    ],
)
def test_balance(hits: list[bool], weights: list[float]) -> None:
    assert balance(hits) == pytest.approx(weights)


def test_after_an_invalid_recommendation_the_user_does_not_speak_and_the_recommender_is_told() -> None:
    episode = an_episode(GAME)
    (reply,) = play(episode, "Reason: no item.")
    assert episode.waiting == RECOMMENDER
    assert episode.views[USER].tokens == USER_OPENING
    assert episode.views[RECOMMENDER].tokens == [
        *REC_OPENING, *ASK, *reply.ids, *text("\n"), *message("user", text("Invalid reply.")), *ASK,
    ]  # fmt: skip
    turn = episode.turns[0]
    assert (turn.item, turn.hit, turn.user_spoke, turn.judgement) == (None, False, False, None)
    assert turn.reward is not None and (turn.reward.rec, turn.reward.user) == (-1.0, None)


def test_an_episode_of_invalid_recommendations_gives_the_recommender_alone_a_trajectory() -> None:
    episode = an_episode(GAME)
    play(episode, "Reason: no item.", "Item: 9")
    assert episode.waiting is None
    (trajectory,) = trajectories([episode], GAME)
    assert trajectory.agent == RECOMMENDER and len(trajectory.turns) == 2


def test_an_invalid_judgement_is_passed_on_and_costs_one() -> None:
    episode = an_episode(GAME)
    rec, user = play(episode, recommend("Delta"), "Action: click\nScore: maybe")
    turn = episode.turns[0]
    assert turn.hit and turn.judgement is None and turn.reward is not None
    # D = 1 in turn 1: .75; and no click, so the conversation goes on
    assert (turn.reward.rec, turn.reward.user) == (pytest.approx(0.75), -1.0)
    assert episode.waiting == RECOMMENDER
    assert episode.views[RECOMMENDER].tokens[-len(ASK) - len(message("user", list(user.ids[:-1]))) :] == [
        *message("user", list(user.ids[:-1])), *ASK,
    ]  # fmt: skip


@pytest.mark.parametrize("closing", [None, ENDOFTEXT, START])
def test_a_reply_that_was_cut_or_ended_otherwise_is_invalid_and_its_message_is_closed(closing: int | None) -> None:
    episode = an_episode(GAME)
    words = list(say(episode, recommend("Delta"), ended=False).ids)
    ids = words if closing is None else [*words, closing]
    reply = Reply(tuple(ids), (-1.0,) * len(ids))
    assert not episode.is_valid(reply)
    episode.receive(reply)
    assert episode.turns[0].item is None
    span = episode.views[RECOMMENDER].spans[0]
    assert episode.views[RECOMMENDER].tokens[span.start : span.end] == ids
    assert episode.views[RECOMMENDER].tokens[span.end : span.end + 1 + len(text("\n"))] == [END, *text("\n")]


def test_a_cut_judgement_is_invalid_and_reaches_the_recommender_as_far_as_it_goes() -> None:
    episode = an_episode(GAME)
    play(episode, recommend("Gamma"))
    reply = say(episode, judge("click", "0.90"), ended=False)
    assert not episode.is_valid(reply)
    episode.receive(reply)
    assert episode.turns[0].judgement is None
    assert episode.views[RECOMMENDER].tokens[-len(ASK) - len(message("user", list(reply.ids))) :] == [
        *message("user", list(reply.ids)), *ASK,
    ]  # fmt: skip


def test_an_episode_ends_at_a_click_even_on_a_wrong_item() -> None:
    episode = an_episode(GameConfig(max_turns=5))
    play(episode, recommend("Omega"), judge("click", "1.00"))
    assert episode.waiting is None and len(episode.turns) == 1 and not episode.turns[0].hit


def test_without_peers_nothing_is_said_of_them() -> None:
    alone = an_episode(GAME, task=replace(TASK, num_peers=0, peer_counts=(0, 0, 0)))
    (rec,) = play(alone, recommend("Gamma"))
    assert alone.views[USER].tokens == [*USER_OPENING, *message("user", list(rec.ids[:-1])), *ASK]


def test_a_judgement_outside_a_conversation_starts_from_the_same_opening() -> None:
    assert judgement_prompt((0, 1), 4, TITLES, 2, 5, CODEC, TEMPLATE, GAME) == [
        *USER_OPENING, *message("user", text("Reason: try this.\nItem: Omega\nPeers: 2 of 5")), *ASK,
    ]  # fmt: skip


FULL_GAME = GameConfig(max_turns=2, prompts="full")
FULL_HISTORY = "oldest first:\nAlpha\nBeta"


def test_the_full_prompts_list_and_name_items_by_number_and_title() -> None:
    episode = an_episode(FULL_GAME)
    replies = play(episode, recommend("1. Gamma"), judge("star", "0.60"), recommend("2. Delta"), judge("click", "0.90"))
    assert [(turn.item, turn.hit) for turn in episode.turns] == [(2, False), (3, True)]
    rec_1, user_1, rec_2, user_2 = (list(reply.ids[:-1]) for reply in replies)
    assert episode.views[RECOMMENDER].tokens == [
        *message("system", text(FULL.system_rec)),
        *message(
            "user", text(f"The user's history, {FULL_HISTORY}\n\nCandidates:\n1. Gamma\n2. Delta\n3. Omega")
        ),
        *ASK, *rec_1, END, *text("\n"),
        *message("user", user_1),
        *ASK, *rec_2, END, *text("\n"),
    ]  # fmt: skip
    system_user = FULL.system_user.partition("Your history, oldest first:")[0]
    peers = "\n\n({} of 5 users with a similar taste chose this item.)"
    assert episode.views[USER].tokens == [
        *message("system", text(f"{system_user}Your history, {FULL_HISTORY}")),
        *message("user", [*rec_1, *text(peers.format(1))]),
        *ASK, *user_1, END, *text("\n"),
        *message("user", [*rec_2, *text(peers.format(4))]),
        *ASK, *user_2, END, *text("\n"),
    ]  # fmt: skip


def test_the_full_prompts_say_what_was_wrong_and_ask_about_one_item_by_number() -> None:
    episode = an_episode(FULL_GAME)
    (reply,) = play(episode, recommend("4. Zeta"))
    invalid = message("user", text("The reply was not in the required format, or named no candidate."))
    assert episode.views[RECOMMENDER].tokens[-len([*invalid, *ASK]) :] == [*invalid, *ASK]
    asked = judgement_prompt((0, 1), 4, TITLES, 2, 5, CODEC, TEMPLATE, FULL_GAME)
    question = "Reason: You may like this one.\nItem: 1. Omega\n\n(2 of 5 users with a similar taste chose this item.)"
    assert asked == [*episode.views[USER].tokens, *message("user", text(question)), *ASK]


@pytest.mark.parametrize("prompts", ["brief", "full"])
@pytest.mark.parametrize("item", ["Delta", "2. Delta", "2.", "2", "delta!"])
def test_either_prompts_understand_a_number_and_a_title(prompts: Any, item: str) -> None:
    episode = an_episode(GameConfig(max_turns=2, prompts=prompts))
    play(episode, recommend(item))
    assert episode.turns[0].hit and episode.waiting == USER


@pytest.mark.parametrize(
    ("reply", "agent", "reason"),
    [
        ("Reason: calm.\nItem: Delta", RECOMMENDER, "Reason: calm.\n"),
        ("Item: Gamma\nno,\n item: Delta", RECOMMENDER, "Item: Gamma\nno,\n"),
        ("Reason: so.\nAction: click\nScore: 0.90", USER, "Reason: so.\n"),
        ("Reason: Item: or Action: alike", USER, "Reason: Item: or Action: alike"),
        ("Item: Delta", RECOMMENDER, ""),
    ],
)
def test_the_reason_ends_where_the_decision_begins(reply: str, agent: int, reason: str) -> None:
    codec, template = family("chatml")
    ids = [*spelled(codec, reply), template.end_of_turn]
    whole = reply == reason
    assert reason_length(codec, ids, agent) == (len(ids) if whole else len(spelled(codec, reason)))
    joined = codec.encode(reply)
    start = reason_length(codec, joined, agent)  # a line break may be one token with what follows
    assert codec.decode(joined[:start]) == reason or whole or codec.decode(joined[: start + 1]).startswith(reason)
