"""The role headers against what each family's own chat template writes.

The Jinja templates here are the published ones without tools, dates and images.
"""

from __future__ import annotations

from typing import Any

import pytest

from coars_fast.config import GameConfig
from coars_fast.game.episode import RECOMMENDER, USER, Reply
from coars_fast.game.template import Role, TextCodec, make_template
from coars_fast.model.tokenizer import train_tokenizer
from tests.game_pieces import TEXTS, an_episode, family, family_tokenizer, judge, recommend

# Qwen2.5-Instruct. Without a system message it would insert one of its own: both views always open with one.
QWEN2 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Qwen3: drops the reasoning of earlier replies, and says "do not think" by an empty one in the generation prompt.
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Llama-3-Instruct. (3.1 and later also put two lines with dates before the first system message's text.)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The fallback for everything else is nobody's: this is what it promises.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ '\n### ' + message.role | capitalize + '\n' + message.content"
    " + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '\n### Assistant\n' }}{% endif %}"
)
JINJA = {"chatml": QWEN2, "qwen3": QWEN3, "llama3": LLAMA3, "plain": PLAIN}

OPENING: list[tuple[Role, str]] = [
    ("system", "Recommend one item."),
    ("user", "History: Alpha; Beta\nCandidates: Gamma; Delta (1995)"),
]
TALK: list[tuple[Role, str]] = [
    *OPENING,
    ("assistant", recommend("Gamma")),
    ("user", judge("skip", "0.30")),
    ("assistant", recommend("2. Delta (1995)")),
    ("user", judge("dislike", "0.12")),
]


def published(of_family: str, talk: list[Any], *, prompt: bool = True, **settings: Any) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in talk]
    settings |= {"chat_template": JINJA[of_family], "add_generation_prompt": prompt}
    return family_tokenizer(of_family).apply_chat_template(messages, tokenize=True, return_dict=False, **settings)


def ours(of_family: str, talk: list[tuple[Role, str]]) -> list[int]:
    codec, template = family(of_family)
    messages = [token for role, content in talk for token in template.message(role, codec.encode(content))]
    return [*template.bos, *messages, *template.headers["assistant"]]


def without_blank_thoughts(of_family: str, ids: list[int], *, keep_last: bool) -> list[int]:
    """Ids without the empty reasoning `<think>\\n\\n</think>\\n\\n`."""
    codec, _ = family(of_family)
    blank = codec.encode("\n\n")
    thought = [codec.vocab["<think>"], *blank, codec.vocab["</think>"], *blank]
    at = [i for i in range(len(ids)) if ids[i : i + len(thought)] == thought]
    for i in reversed(at[: len(at) - keep_last]):
        ids = ids[:i] + ids[i + len(thought) :]
    return ids


@pytest.mark.parametrize("of_family", ["chatml", "llama3", "plain"])
@pytest.mark.parametrize("length", [2, 4, 6])
def test_a_conversation_is_the_family_s_own_token_for_token(of_family: str, length: int) -> None:
    assert family(of_family)[1].name == of_family
    assert ours(of_family, TALK[:length]) == published(of_family, TALK[:length])


@pytest.mark.parametrize("of_family", ["chatml", "llama3", "plain"])
def test_a_reference_before_the_reply_is_a_system_message_that_the_family_knows(of_family: str) -> None:
    talk = [*TALK, ("system", "Note: wrong, the user took Delta (1995)")]
    assert ours(of_family, talk) == published(of_family, talk)


def test_qwen3_opens_a_reply_as_its_own_non_thinking_prompt() -> None:
    assert family("qwen3")[1].name == "chatml"
    assert ours("qwen3", OPENING) == published("qwen3", OPENING, enable_thinking=False)
    assert ours("qwen3", OPENING) != published("qwen3", OPENING)


def test_qwen3_keeps_the_empty_thought_of_earlier_replies_where_its_own_template_drops_it() -> None:
    """The family's template rewrites the past: a reply that was sampled after an empty thought stands without it in the
    next prompt, so cached prefixes and recorded log-probs would no longer hold. Ours keeps it, and differs in nothing
    else."""
    mine, theirs = ours("qwen3", TALK), published("qwen3", TALK, enable_thinking=False)
    assert mine != theirs
    assert without_blank_thoughts("qwen3", mine, keep_last=True) == theirs
    first = published("qwen3", OPENING, enable_thinking=False)
    assert theirs[: len(first)] != first, "the family's own template is not append-only"
    assert mine[: len(first)] == first


@pytest.mark.parametrize("of_family", ["chatml", "qwen3", "llama3", "plain"])
def test_the_views_of_a_played_episode_are_the_family_s_conversation(of_family: str) -> None:
    """Replies encoded as the tokenizer would encode them: then the views are what the chat template writes."""
    episode = an_episode(GameConfig(max_turns=3), of_family=of_family)
    codec, template = episode.codec, episode.template
    texts = [recommend("Gamma"), judge("skip", "0.30"), recommend("Omega")]
    for text in texts:
        ids = (*codec.encode(text), template.end_of_turn)
        episode.receive(Reply(ids, (0.0,) * len(ids)))
    rec, user = texts[0], texts[1]
    opening = "History: Alpha; Beta\nCandidates: Gamma; Delta; Omega"
    talks: dict[int, list[tuple[Role, str]]] = {
        RECOMMENDER: [
            ("system", "Recommend one item."), ("user", opening), ("assistant", rec), ("user", user),
            ("assistant", texts[2]),
        ],
        USER: [
            ("system", "Judge the item.\nHistory: Alpha; Beta"), ("user", rec + "\nPeers: 1 of 5"), ("assistant", user),
            ("user", texts[2] + "\nPeers: 0 of 5"),
        ],
    }  # fmt: skip
    for agent, talk in talks.items():
        waits = talk[-1][0] == "user"
        theirs = published(of_family, talk, prompt=waits, enable_thinking=False)
        mine = episode.views[agent].tokens
        if of_family == "qwen3":
            # Its own template also drops or adds the empty thought of the last reply, depending on what follows.
            mine, theirs = (without_blank_thoughts(of_family, ids, keep_last=False) for ids in (mine, theirs))
        assert codec.tokenizer.decode(mine) == codec.tokenizer.decode(theirs)
        if agent == RECOMMENDER:  # before "\nPeers" the user's view breaks tokens where the reply ended
            assert mine == theirs


def test_a_tokenizer_trained_on_the_spot_speaks_the_same_chatml() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    codec = TextCodec(tokenizer)
    template = make_template(codec)
    mine = [token for role, content in TALK for token in template.message(role, codec.encode(content))]
    messages = [{"role": role, "content": content} for role, content in TALK]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=QWEN2, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert [*template.bos, *mine, *template.headers["assistant"]] == theirs


@pytest.mark.parametrize(
    ("of_family", "closing"), [("chatml", "<|im_end|>\n"), ("llama3", "<|eot_id|>"), ("plain", "</s>")]
)
def test_a_message_closes_as_the_family_closes_it(of_family: str, closing: str) -> None:
    codec, template = family(of_family)
    assert codec.tokenizer.decode(template.end) == closing
    assert template.end_of_turn in template.control
    assert codec.special_ids <= template.control


def test_marks_that_a_tokenizer_does_not_call_special_end_a_reply_too() -> None:
    codec, template = family("chatml-not-special")
    assert template.name == "chatml" and codec.special_ids == {codec.vocab["<|endoftext|>"]}
    assert template.control == {codec.vocab[t] for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}


@pytest.mark.parametrize("of_family", ["chatml", "qwen3", "llama3", "plain"])
def test_decoded_text_leaves_special_tokens_out(of_family: str) -> None:
    codec, template = family(of_family)
    assert codec.decode([*template.bos, *codec.encode("Up"), *sorted(codec.special_ids)]) == "Up"


def test_a_thought_does_not_end_a_reply() -> None:
    codec, template = family("qwen3")
    assert codec.vocab["<think>"] not in template.control
