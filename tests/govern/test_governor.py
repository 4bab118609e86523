"""The governor on a simulated clock: near the best static choice, never far below plain, whatever the stream or the clock."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from hf_onlinespec.govern.acceptance import AcceptanceConstants, Continuation, RequestStats, TokenSource
from hf_onlinespec.govern.governor import Governor
from tests.govern.world import BUDGET, PASSES, STEP, STREAMS, TOKENS, World, best_static, outcomes


@pytest.mark.parametrize("stream", STREAMS)
def test_never_far_below_the_best_static_choice(stream: str) -> None:
    """Learning included, where there is nothing to gain by it."""
    alpha = STREAMS[stream]
    ours = sum(World(alpha, seed=seed).run(100) for seed in range(3)) / 3
    assert ours > 0.95 * best_static(alpha, 100)


def test_learns_in_the_shadow_and_is_switched_on_when_it_pays() -> None:
    def unseen(request: int, steps: int) -> tuple[float, float]:
        return 0.75 - 0.7 * math.exp(-steps / 40), 0.03

    world = World(unseen)
    world.run(8)
    early = dict(world.governor.decisions.rounds)
    assert early["plain"] > 10 * early["model"]  # while it is useless, it hardly drafts
    world.run(150)
    before = dict(world.governor.decisions.rounds)
    world.run(20)
    late = {name: n - before[name] for name, n in world.governor.decisions.rounds.items()}
    assert late["model"] > 20 * late["plain"]
    assert world.tokens / world.time_s > 1.05 * best_static(unseen, 60)
    assert world.update_s / world.time_s <= BUDGET + 0.01


@pytest.mark.parametrize("seed", range(3))
def test_learning_never_takes_more_than_its_budget(seed: int) -> None:
    world = World(lambda request, steps: (0.05 + 0.9 * (1 - math.exp(-steps / 200)), 0.05), seed=seed)
    for _ in range(60):
        world.run(1)
        first = (1 + PASSES) * STEP * 1.5  # the price is not known before the first update
        assert world.update_s <= BUDGET * world.time_s + first


def test_a_changed_stream_wakes_the_learner() -> None:
    change = 150
    world = World(lambda request, steps: (0.7, 0.7) if request < change else (0.1, 0.1))
    world.run(change)
    assert world.governor.decisions.budget_fraction < 1  # nothing was gained for long
    world.run(6)
    assert world.governor.decisions.budget_fraction == 1.0 and "full budget" in world.governor.decisions.learning


def test_the_frozen_draft_serves_while_the_learned_one_is_worse() -> None:
    governor = Governor(BUDGET, PASSES)
    for _ in range(8):
        governor.observe_comparison([0.5] * TOKENS, [0.6] * TOKENS)
    assert governor.router.use_base(0.0) and abs(governor.acceptances.rate - 0.6) < 0.05
    for _ in range(12):
        governor.observe_comparison([0.7] * TOKENS, [0.6] * TOKENS)
    assert not governor.router.use_base(0.0)


def test_the_prompt_tells_who_serves_unless_experience_says_otherwise() -> None:
    governor = Governor(BUDGET, PASSES)
    assert governor.router.use_base(-0.5) and not governor.router.use_base(0.5)
    for _ in range(4):
        governor.observe_comparison([0.7] * TOKENS, [0.2] * TOKENS, prompt_log_ratio=0.5)
    assert governor.router.use_base(-0.5) and not governor.router.use_base(
        0.5
    )  # another kind of prompt: nothing was learned about it
    for _ in range(4):
        governor.observe_comparison([0.7] * TOKENS, [0.2] * TOKENS, prompt_log_ratio=-0.5)
    assert not governor.router.use_base(-0.5)
    for _ in range(4):
        governor.observe_comparison([0.2] * TOKENS, [0.7] * TOKENS, prompt_log_ratio=0.5)
    assert governor.router.use_base(0.5) and not governor.router.use_base(-0.5)


def test_prompts_that_all_say_the_same_are_asked_less_often() -> None:
    world = World(lambda request, steps: (0.8, 0.8))
    world.run(3)
    governor, asked = world.governor, []
    for prompt_log_ratio in [0.5] * 20 + [-0.5] * 4:
        asked.append(governor.decide_prompt_scoring())
        if asked[-1]:
            governor.router.observe_prompt(prompt_log_ratio)
    assert all(asked[:6]) and sum(asked[8:20]) == 4  # then one of three
    assert governor.router.use_base() and all(asked[-2:])  # one has spoken for the other draft: all are asked again
    useless = World(lambda request, steps: (0.0, 0.0))
    useless.run(10)
    assert not useless.governor.decide_prompt_scoring()


def test_a_request_that_may_be_a_good_one_is_tried() -> None:
    """Where requests differ much, one that has shown nothing yet is; not where few tokens are left, nor once it has shown itself."""
    governor, drafted = Governor(BUDGET, PASSES), [TokenSource("model", 0, (4,))]
    for overlap in (0.05, 0.75) * 15:
        seen = RequestStats()
        for _ in range(3):
            governor.observe((), (), 0.0, 1.0, seen)
            governor.observe(drafted, outcomes(drafted, [overlap]), 0.35, 1.2, seen)
            governor.observe(drafted, outcomes(drafted, [overlap]), 0.35, 1.2, seen)
        governor.request_ended(TOKENS, seen)
    assert governor.plan(seen=RequestStats(), room=64).lookahead > 0
    assert governor.plan(seen=RequestStats(), room=8).lookahead == 0  # on average it does not pay
    assert governor.plan(seen=RequestStats(acceptance=0.2, positions=8), room=64).lookahead == 0


def test_a_prompt_is_read_where_that_pays() -> None:
    """Long prompts before short answers cost more than a good draft brings; and of the answers' length the governor learns."""
    governor = world_that_drafts()
    assert governor.plan(room=64, unread=500).lookahead > 0  # what reading costs is not known yet
    governor.observe_prefill(500, 500 * 0.05 * governor.costs.pace_s)  # 25 plain steps
    for _ in range(20):
        governor.request_ended(200)
    assert governor.plan(room=300, unread=500).lookahead > 0
    assert governor.plan(room=20, unread=500).lookahead == 0 and governor.plan(room=20, unread=5).lookahead > 0
    assert governor.decide_prompt_scoring(30, 300) and not governor.decide_prompt_scoring(500, 30)
    for _ in range(20):
        governor.request_ended(20)
    assert governor.plan(room=300, unread=500).lookahead == 0


def world_that_drafts() -> Governor:
    """After twenty requests in which drafting paid."""
    world = World(lambda request, steps: (0.8, 0.8))
    world.run(20)
    assert world.governor.plan(room=64).lookahead > 0
    return world.governor


def test_what_no_clock_can_have_measured_is_not_taken_in() -> None:
    governor = world_that_drafts()
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        governor.observe_prefill(500, seconds)
    assert governor.plan(room=20, unread=500).lookahead > 0


def test_the_first_neural_token_of_a_round_is_dearer() -> None:
    governor = Governor(BUDGET, PASSES)
    for _ in range(20):
        governor.observe((), (), 0.0, 1.0)
        for k in (1, 4):  # 0.4 for the first, 0.05 for each one more
            drafted = [TokenSource("model", i, (7,)) for i in range(k)]
            governor.observe(drafted, outcomes(drafted, [1.0] * k), 0.35 + 0.05 * k, 1.1)
    plan = governor.plan()
    survival = 0.6
    assert governor.model_pays(plan, 2, survival, begun=True) and not governor.model_pays(
        plan, 2, survival, begun=False
    )


def test_a_memory_that_is_wrong_in_this_request_is_asked_less() -> None:
    governor, seen = Governor(BUDGET, PASSES), RequestStats()
    answer = found(12, 1.0)
    usual = governor.acceptances.memory(answer)[1]
    key = governor.acceptances.memory_key(answer)
    for _ in range(12):
        governor.acceptances.observe_answer(key, 0.0, seen)
        governor.acceptances.observe_answer(key, 1.0, RequestStats())  # other requests
    calibration = governor.acceptances.memory_calibration(seen)
    assert calibration < 0.4
    assert governor.acceptances.memory(answer, calibration=calibration)[1] < 0.5 * usual
    assert governor.acceptances.memory_calibration(RequestStats()) == 1.0


def test_a_draft_slower_than_the_target_is_left_alone() -> None:
    world = World(lambda request, steps: (0.9, 0.9), draft_step=1.5)
    world.run(30)
    rounds = world.governor.decisions.rounds
    assert rounds["plain"] > 0.98 * sum(rounds.values())
    assert "plain" in world.governor.decisions.drafting


def test_an_idle_draft_is_tried_again_ever_more_rarely() -> None:
    governor = Governor(BUDGET, PASSES)
    tried = []
    for i in range(4000):
        plan = governor.plan()
        drafted = [TokenSource("model", j, (0,)) for j in range(plan.lookahead)]
        governor.observe(drafted, outcomes(drafted, [0.0]), 0.5 * len(drafted), 1.0 + 0.05 * len(drafted))
        if drafted and i > 20:
            tried.append(i)
    gaps = [b - a for a, b in itertools.pairwise(tried[::2])]  # two rounds each: the first may have to read the prompt
    assert 20 <= len(tried) <= 44 and gaps == sorted(gaps)
    assert governor.decisions.probes >= len(tried) / 2


@pytest.mark.parametrize("seconds", [0.0, -1e6, float("inf"), float("nan"), 1e9, 1e-12])
def test_a_clock_that_jumps(seconds: float) -> None:
    """One absurd time neither breaks a decision nor changes it for long."""
    world = World(lambda request, steps: (0.7, 0.7))
    world.run(20)
    drafted = [TokenSource("model", 0, (3,))]
    world.governor.observe(drafted, outcomes(drafted, [1.0]), seconds, seconds)
    world.governor.budget.spent(seconds, 1)
    for _ in range(3):
        plan = world.governor.plan()
        assert 0 <= plan.lookahead <= AcceptanceConstants().max_lookahead and math.isfinite(plan.rate) and plan.rate > 0
        assert world.governor.budget.affordable_steps() in range(2 + PASSES)
    before = dict(world.governor.decisions.rounds)
    world.run(10)
    after = world.governor.decisions.rounds
    assert after["model"] - before["model"] > after["plain"] - before["plain"]


def memory_drafts(governor: Governor, answer: Continuation, right: float, plain_s: float, guessed_s: float) -> bool:
    """A round of the memory alone: whether its answer was taken, which is right with this chance."""
    plan = governor.plan(drafts=False)
    key, chance = governor.acceptances.memory(answer, first=True)
    drafted = [TokenSource("memory", 0)] if governor.guess_pays(plan, 0, chance) else []
    governor.observe(drafted, outcomes(drafted, [right]), 0.0, guessed_s if drafted else plain_s)
    if drafted:
        governor.acceptances.observe_answer(key, right, RequestStats())
    return bool(drafted)


def test_one_stall_switches_nothing_off() -> None:
    """Of the memory, of the draft, of learning: each is slow once, and goes on."""
    answer = Continuation((5,), (1.0,), 12, 10)
    governor = Governor(BUDGET, PASSES)

    def memory_round(seconds: float) -> bool:
        return memory_drafts(governor, answer, 1.0, seconds, 1.1 * seconds)

    governor.observe((), (), 0.0, 1.0)
    assert memory_round(4.0)
    assert sum(memory_round(1.0) for _ in range(400)) > 300

    world = World(lambda request, steps: (0.8, 0.8))
    world.run(3)
    drafted = [TokenSource("model", i, (3,)) for i in range(9)]
    world.governor.observe(drafted, outcomes(drafted, [1.0] * 9), 30.0, 40.0)
    world.governor.budget.spent(600.0, 1)
    plan = world.governor.plan()
    assert plan.lookahead > 0 and 1 < plan.rate < 4
    before = world.steps
    world.run(60)
    assert world.steps > before and world.tokens / world.time_s > 1.1


def test_a_draft_whose_first_times_are_absurd_is_tried_again() -> None:
    world = World(lambda request, steps: (0.9, 0.9))
    steady = world.noisy
    world.noisy = lambda seconds: steady(seconds) * (10 if seconds < 0.9 else 1)  # type: ignore[method-assign]
    world.run(2)  # only drafting takes less than a plain step
    world.noisy = steady  # type: ignore[method-assign]
    world.run(150)
    before = dict(world.governor.decisions.rounds)
    world.run(10)
    assert world.governor.decisions.rounds["model"] - before["model"] > 50


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_that_has_become_good_is_found_again_without_learning(seed: int) -> None:
    """Nothing but its own probes tells: a draft that does not learn, back in its home domain. One that goes well is followed up."""
    governor, rng = Governor(BUDGET, PASSES), random.Random(seed)

    def rounds(a: float, n: int) -> int:
        drafting = 0
        for _ in range(n):
            plan = governor.plan()
            k, overlaps = plan.lookahead, []
            while len(overlaps) < k and (not overlaps or overlaps[-1]):
                overlaps.append(float(rng.random() < a))
            drafted = [TokenSource("model", i, (4,)) for i in range(k)]
            governor.observe(drafted, outcomes(drafted, overlaps), 0.12 * k, 1.0 + 0.05 * k + 0.1 * (k > 0))
            drafting += k > 0
        return drafting

    assert rounds(0.8, 300) > 250
    assert rounds(0.03, 2500) < 150
    assert rounds(0.8, 900) > 700


def test_what_was_not_looked_at_tells_nothing_about_who_served() -> None:
    governor = Governor(BUDGET, PASSES)
    for _ in range(4):
        governor.observe_comparison([0.8] * TOKENS, [0.1] * TOKENS, prompt_log_ratio=0.5)
        governor.observe_comparison([0.1] * TOKENS, [0.7] * TOKENS, prompt_log_ratio=-0.5)
    before = governor.acceptances.mean_rate(False), governor.acceptances.mean_rate(True)
    assert before[0] > 0.7 and before[1] > 0.6
    for _ in range(4):
        governor.observe_comparison([0.1] * TOKENS, None, prompt_log_ratio=-0.5)  # the base draft serves these
    assert (governor.acceptances.mean_rate(False), governor.acceptances.mean_rate(True)) == before


def test_a_few_tokens_do_not_decide_who_serves() -> None:
    governor = Governor(BUDGET, PASSES)
    for _ in range(4):
        governor.observe_comparison([1.0] * TOKENS, [0.5] * TOKENS)
    for _ in range(6):
        governor.observe_comparison([0.0], [1.0])
    assert not governor.router.use_base(0.0)


def test_learning_is_worth_what_it_adds_to_the_memory() -> None:
    right, wrong = [0.95] * TOKENS, [0.0] * TOKENS
    fractions = []
    for recalled in (right, wrong):
        governor = Governor(BUDGET, PASSES)
        for i in range(40):
            governor.observe_comparison([min(0.9, 0.02 * i)] * TOKENS, [0.0] * TOKENS, recalled)
        fractions.append(governor.decisions.budget_fraction)
    assert fractions[0] < fractions[1] == 1.0


def test_what_is_not_a_number_is_not_taken_in() -> None:
    governor = Governor(BUDGET, PASSES)
    for learned, base in ((math.nan, 0.5), (0.5, math.nan), (math.nan, None)):
        governor.observe_comparison([0.5, learned], None if base is None else [0.5, base])
    governor.observe_comparison([0.6] * TOKENS, [0.5] * TOKENS)
    assert 0.5 < governor.acceptances.rate < 0.7 and not governor.router.use_base(0.0)


def test_rounds_of_nothing_and_requests_of_one_token() -> None:
    governor = Governor(BUDGET, PASSES)
    for _ in range(50):
        plan = governor.plan()
        assert plan.lookahead >= 0
        governor.observe((), (), 0.0, 0.0)
        governor.request_ended(1)
        governor.observe_comparison([], None)
        governor.budget.spent(0.0, 0)
    assert governor.decisions.rounds["plain"] == 50 and not governor.router.use_base(0.0)


def test_the_same_story_gives_the_same_decisions() -> None:
    first, second = World(STREAMS["at break-even"]), World(STREAMS["at break-even"])
    assert first.run(20) == second.run(20) and first.governor.decisions == second.governor.decisions


def found(length: int, share: float) -> Continuation:
    return Continuation((5, 6), (share, 1 - share), length, 10)


def test_the_memory_is_believed_as_far_as_it_was_right() -> None:
    governor = Governor(BUDGET, PASSES)
    for _ in range(5):
        governor.observe((), (), 0.0, 1.0)
    for length, right in ((4, 0.0), (12, 1.0)):
        key = governor.acceptances.memory_key(found(length, 1.0), first=True)
        for _ in range(40):
            drafted = [TokenSource("memory", 0)]
            governor.observe(drafted, outcomes(drafted, [right]), 0.0, 1.2)
            governor.acceptances.observe_answer(key, right, RequestStats())
    plan = governor.plan(drafts=False)
    assert plan.lookahead == 0
    right_one, wrong_one = (governor.acceptances.memory(found(length, 1.0), True)[1] for length in (12, 4))
    assert right_one > 0.9 > 0.2 > wrong_one
    assert governor.guess_pays(plan, 0, right_one)
    assert not governor.guess_pays(plan, 0, wrong_one)
    assert not governor.guess_pays(plan, 5, 0.01 * right_one)  # hardly ever gets that far
    assert not governor.guess_pays(plan, governor.constants.planner.max_candidates, 1.0)


def test_a_drafted_token_has_to_beat_the_rate_that_is_had_already() -> None:
    """One that brings more than plain decoding would in the same time is left where the memory brings still more."""
    weak = Continuation((5, 6, 7), (0.34, 0.33, 0.33), 4, 3)
    pays = {}
    for right in (0.0, 1.0):
        governor = Governor(BUDGET, PASSES)
        drafted = [TokenSource("memory", i) for i in range(8)]
        governor.observe((), (), 0.0, 1.0)
        for _ in range(60):
            governor.plan(drafts=False)
            governor.observe(drafted, outcomes(drafted, [right] * (8 if right else 1)), 0.0, 1.8)
        plan = governor.plan(drafts=False)
        assert plan.rate == 1.0 if not right else 2.5 < plan.rate < 9 / 1.8
        pays[right] = governor.guess_pays(plan, 5, 0.99 * governor.acceptances.memory(weak)[1])
    assert pays == {0.0: True, 1.0: False}


def test_a_memory_that_has_become_right_is_asked_again() -> None:
    """What is refused would never be seen to be right: it is asked now and then."""
    governor = Governor(BUDGET, PASSES)
    answer = found(4, 1.0)
    governor.observe((), (), 0.0, 1.0)

    def rounds(right: float, n: int) -> int:
        return sum(memory_drafts(governor, answer, right, 1.0, 1.2) for _ in range(n))

    assert 0 < rounds(0.0, 1000) < 100
    assert rounds(1.0, 6000) > 1000


def test_memory_or_neural_by_what_each_brings() -> None:
    """A free token is preferred to a dear one unless it is much less likely."""
    governor = Governor(BUDGET, PASSES)
    for _ in range(40):
        governor.observe((), (), 0.0, 1.0)
        drafted = [TokenSource("model", i, (5,)) for i in range(3)]
        governor.observe(drafted, outcomes(drafted, [1.0, 1.0, 0.0]), 0.6, 1.2)
    plan = governor.plan()
    assert plan.lookahead > 0
    good, bad = found(12, 1.0), found(2, 0.4)
    for share, answer in ((1.0, good), (0.0, bad)):
        for _ in range(40):
            drafted = [TokenSource("memory", 0)]
            governor.observe(drafted, outcomes(drafted, [share]), 0.0, 1.1)
            governor.acceptances.observe_answer(
                governor.acceptances.memory_key(answer, first=True), share, RequestStats()
            )
    likely, unlikely = (governor.acceptances.memory(answer, first=True)[1] for answer in (good, bad))
    assert governor.guess_beats_model(plan, 0, 1.0, likely)
    assert not governor.guess_beats_model(plan, 0, 1.0, unlikely)


def test_a_machine_that_slows_down_changes_no_decision() -> None:
    """Others use it in bursts: everything takes longer for a while."""
    for alpha, lookahead in ((0.75, True), (0.1, False)):
        world = World(lambda request, steps, a=alpha: (a, a))  # type: ignore[misc]
        world.run(20)
        before = dict(world.governor.decisions.rounds)
        steady = world.noisy
        for burst in range(12):
            slow = 3.0 if burst % 2 else 1.0
            world.noisy = lambda seconds, steady=steady, slow=slow: steady(seconds) * slow  # type: ignore[method-assign]
            world.run(2)
        rounds = {name: n - before[name] for name, n in world.governor.decisions.rounds.items()}
        few, many = ("plain", "model") if lookahead else ("model", "plain")
        assert rounds[few] < 0.1 * rounds[many]


def test_the_next_best_tokens_of_a_model_are_no_memory() -> None:
    governor = Governor(BUDGET, PASSES)
    drafted, beside, recycled = TokenSource("model", 0, (7,)), TokenSource("model", 0), TokenSource("recycled", 0)
    for proposed in ([drafted, beside], [drafted, recycled], [recycled]):
        governor.observe(proposed, [], 0.1, 1.0)
    assert governor.decisions.rounds == {"plain": 0, "model": 1, "memory": 1, "memory+model": 1}


def guessed_per_round(governor: Governor, rounds: int, plain_s: float, drafts: bool) -> float:
    """Guesses that a governor buys in each of so many rounds; each is right three times of five, and verifying one takes a twentieth."""
    right, bought = random.Random(0), 0
    for _ in range(rounds):
        plan = governor.plan(drafts, RequestStats(), room=40)
        k = model = int(plan.lookahead > 0)
        while k < 4 and governor.guess_pays(plan, k, 0.6 ** (k + 1)):
            k += 1
        drafted = [TokenSource("model" if at < model else "memory", at, (3,) if at < model else ()) for at in range(k)]
        kept = [float(right.random() < 0.6) for _ in range(k)]
        seen = kept[: kept.index(0.0) + 1] if 0.0 in kept else kept
        governor.observe(drafted, outcomes(drafted, seen), 0.15 * plain_s * model, (1 + 0.05 * k) * plain_s)
        bought += k
    return bought / rounds


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("slower", [3.0, 10.0, 30.0])
def test_a_machine_that_becomes_slower_at_once_is_drafted_on_again(slower: float, drafts: bool) -> None:
    """The first plain step was fast, and everything after it seems to take long: that says nothing about verifying."""
    governor = Governor(BUDGET, PASSES)
    governor.observe((), (), 0.0, 1.0 / slower)
    guessed_per_round(governor, 60, 1.0, drafts)
    assert guessed_per_round(governor, 200, 1.0, drafts) > 3.5


def test_a_stall_says_nothing_about_the_machine() -> None:
    governor = Governor(BUDGET, PASSES)
    governor.observe((), (), 0.0, 1.0)
    guessed_per_round(governor, 200, 1.0, False)
    known = governor.costs.verify.at(4)
    governor.observe((), (), 0.0, 30.0)
    assert governor.costs.verify.at(4) == known and governor.costs.pace_s < 1.3
    governor.observe((), (), 0.0, 1.0)
    governor.observe((), (), 0.0, 30.0)
    assert governor.costs.verify.at(4) == known
    guessed_per_round(governor, 5, 1.0, False)  # rounds between two stalls
    governor.observe((), (), 0.0, 30.0)
    assert governor.costs.verify.at(4) == pytest.approx(known, abs=0.02) and governor.costs.pace_s < 2


def test_what_reading_a_prompt_takes_is_measured_anew_on_a_slower_machine() -> None:
    governor = Governor(BUDGET, PASSES)
    governor.observe((), (), 0.0, 0.1)
    governor.observe_prefill(100, 1.0)  # ten of those steps, and one of the later ones
    assert governor.costs.prefill(100) == pytest.approx(10.0)
    for _ in range(3):
        governor.observe((), (), 0.0, 1.0)
    governor.observe_prefill(100, 1.0)
    assert governor.costs.prefill(100) == pytest.approx(1.0)
