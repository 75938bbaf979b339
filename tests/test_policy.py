"""Sampling and log-probabilities: left padding, masks by position, and the lean forward against the library."""

import math

import pytest
import torch
from conftest import kept_for_backward, llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BloomConfig

from crlhf import policy as P
from crlhf.engine import forward
from crlhf.engine.files import stream
from crlhf.engine.models import save, scalar_model
from crlhf.engine.text import decode, make_batch, pad_prompts, positions

PROMPTS = [
    "the plot was dull .",
    "i loved the music . i hated the cast . the script was good .",
    "i liked the camera .",
]
RESPONSES = ["the cast was weak .", "i liked the acting and the story was nice .", "."]


def sample_tokens(model, tokenizer, prompts, n_tokens, generator, **settings):
    """The ids and the mask of sampled responses."""
    batch = P.sample(model, tokenizer, prompts, n_tokens, generator=generator, **settings)
    return batch.response_ids, batch.response_mask


@pytest.fixture(params=["gpt2", "llama"])
def model(request, policy, tokenizer):
    return policy if request.param == "gpt2" else llama(tokenizer)


def plain_log_probs(model, tokenizer, prompt, response):
    """One row alone, no padding, the library's own forward and a softmax written out."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    response_ids = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    return [
        logits[len(prompt_ids) - 1 + t].double().log_softmax(-1)[token].item() for t, token in enumerate(response_ids)
    ]


def test_left_padded_log_probs_equal_each_row_alone(model, tokenizer):
    batch = make_batch(tokenizer, PROMPTS, RESPONSES, 24)
    log_probs = P.response_log_probs(model, batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        alone = plain_log_probs(model, tokenizer, prompt, response)
        assert log_probs[row][batch.response_mask[row]].tolist() == pytest.approx(alone, abs=2e-4)


def test_left_padded_values_equal_each_row_alone(model, tokenizer, tmp_path):
    save(tmp_path, model, tokenizer)
    critic = scalar_model(str(tmp_path), tokenizer.pad_token_id)
    torch.nn.init.normal_(critic.score.weight, generator=stream(0, "head"))
    batch = make_batch(tokenizer, PROMPTS, RESPONSES, 24)
    values = P.response_values(critic, batch)
    for row, prompt in enumerate(PROMPTS):
        prompt_ids = tokenizer(prompt)["input_ids"]
        n = int(batch.response_mask[row].sum())
        for t in range(n):  # V before token t is the library's score of everything up to it
            ids = prompt_ids + batch.response_ids[row, :t].tolist()
            alone = critic(torch.tensor([ids])).logits.item()
            assert values[row, t].item() == pytest.approx(alone, abs=2e-4)


def test_lean_forward_and_its_gradients_equal_the_library(policy, tokenizer, monkeypatch):
    batch, results = make_batch(tokenizer, PROMPTS, RESPONSES, 24), []
    assert forward.is_lean(policy)
    for path in ("lean", "library"):
        if path == "library":
            monkeypatch.setattr(forward, "is_lean", lambda model: False)
        log_probs = P.response_log_probs(policy, batch) * batch.response_mask
        policy.zero_grad()
        log_probs.sum().backward()
        results.append([log_probs.detach(), *(parameter.grad.clone() for parameter in policy.parameters())])
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_values_scores_and_samples_of_the_lean_path_equal_the_librarys(policy, tokenizer, tmp_path, monkeypatch):
    save(tmp_path, policy, tokenizer)
    scalar = scalar_model(str(tmp_path), tokenizer.pad_token_id)
    torch.nn.init.normal_(scalar.score.weight, generator=stream(0, "head"))
    batch = make_batch(tokenizer, PROMPTS, RESPONSES, 24)
    sequences = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    results = []
    assert forward.is_lean(scalar)
    for path in ("lean", "library"):
        if path == "library":
            monkeypatch.setattr(forward, "is_lean", lambda model: False)
        values = P.response_values(scalar, batch)[batch.response_mask]
        scores = forward.sequence_logits(scalar, sequences, tokenizer.pad_token_id)
        prompts = batch.prompt_ids, batch.prompt_mask
        response_ids, _ = sample_tokens(policy, tokenizer, prompts, 12, stream(0, "seam"), k=2)
        results.append((values, scores, response_ids))
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_recomputed_activations_give_the_same_gradients_and_keep_less(model, tokenizer):
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5  # it must not wake up
    batch = make_batch(tokenizer, PROMPTS, RESPONSES, 24)
    plain, kept = kept_for_backward(model, batch)
    prompts = batch.prompt_ids, batch.prompt_mask
    sampled, _ = sample_tokens(model, tokenizer, prompts, 8, stream(0, "again"))
    forward.recompute_activations(model)
    again, kept_again = kept_for_backward(model, batch)
    for ours, expected in zip(again, plain):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert kept_again < 0.6 * kept, (kept_again, kept)
    assert torch.equal(sample_tokens(model, tokenizer, prompts, 8, stream(0, "again"))[0], sampled)


def test_cached_sampling_draws_from_the_log_probs_it_reports(model, tokenizer):
    """Greedy-like sampling at a tiny temperature must take the argmax of the uncached forward, with padding."""
    prompts = pad_prompts(tokenizer, PROMPTS)
    response_ids, response_mask = sample_tokens(model, tokenizer, prompts, 12, stream(0, "greedy"), temperature=1e-3)
    for row, prompt in enumerate(PROMPTS):
        prefix = tokenizer(prompt)["input_ids"]
        for token in response_ids[row][response_mask[row]].tolist():
            with torch.no_grad():
                logits = model(torch.tensor([prefix])).logits[0, -1]
            top = logits.topk(2)
            if top.values[0] - top.values[1] > 0.01:
                assert token == top.indices[0].item()
            prefix = prefix + [token]


def test_cached_steps_give_the_librarys_logits(model, tokenizer):
    """Token by token through the cache, with left padding, as one uncached pass of the library."""
    batch = make_batch(tokenizer, PROMPTS, RESPONSES, 24)
    ids, mask = batch.ids_and_mask()
    n, T = batch.prompt_ids.shape[1], batch.response_ids.shape[1]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask)).logits
        cache = forward.Cache(model, batch.prompt_mask, T)
        steps = [cache.next_logits(batch.prompt_ids)]
        steps += [cache.next_logits(batch.response_ids[:, t : t + 1]) for t in range(T - 1)]
    ours, theirs = torch.stack(steps, 1), expected[:, n - 1 : -1]
    assert torch.allclose(ours[batch.response_mask], theirs[batch.response_mask], atol=1e-4)


def test_sampling_frequencies_match_the_models_probabilities(model, tokenizer):
    """Chi-square of 20,000 first tokens and of second tokens after the commonest first one."""
    prompt, n = "the plot was dull .", 20_000
    ids, mask = pad_prompts(tokenizer, [prompt, PROMPTS[1]])
    rows = torch.zeros(n, dtype=torch.long)
    prompts = ids[rows], mask[rows]
    response_ids, response_mask = sample_tokens(model, tokenizer, prompts, 2, stream(1, "chi"), temperature=0.7)

    def check(tokens, prefix):
        with torch.no_grad():
            probs = (model(torch.tensor([prefix])).logits[0, -1].double() / 0.7).softmax(-1)
        expected = probs * len(tokens)
        counts = torch.bincount(tokens, minlength=len(probs)).double()
        common = expected >= 5
        chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
        df = max(int(common.sum()) - 1, 1)
        assert chi2 < df + 4.5 * math.sqrt(2 * df), (chi2, df)  # p of about 1e-5
        assert counts[~common].sum() < 5 * (expected[~common].sum() + 2)

    first = response_ids[:, 0]
    prefix = tokenizer(prompt)["input_ids"]
    check(first, prefix)
    going_on = first[first != tokenizer.eos_token_id]
    commonest = going_on.mode().values.item()
    check(response_ids[first == commonest, 1], prefix + [commonest])


def test_rows_stop_at_eos_and_the_mask_includes_it(policy, tokenizer):
    ids, mask = pad_prompts(tokenizer, PROMPTS * 40)
    response_ids, response_mask = sample_tokens(policy, tokenizer, (ids, mask), 16, stream(0, "eos"), temperature=3.0)
    eos, stopped = tokenizer.eos_token_id, 0
    for row_ids, row_mask in zip(response_ids.tolist(), response_mask.tolist()):
        length = sum(row_mask)
        assert row_mask == [True] * length + [False] * (len(row_mask) - length)
        if eos in row_ids:
            stopped += 1
            assert row_ids.index(eos) == length - 1
        else:
            assert length == response_mask.shape[1]
        assert all(token == tokenizer.pad_token_id for token in row_ids[length:])
    assert stopped > 20


def test_padding_with_the_eos_token_keeps_eos_in_the_mask(tokenizer):
    """Many tokenizers pad with EOS: a mask by token identity would hide the EOS to be learned."""
    same = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>", pad_token="<eos>")
    batch = make_batch(same, PROMPTS[:2], RESPONSES[:2], 24)
    lengths = batch.response_mask.sum(1).tolist()
    assert lengths == [6, 11]
    assert batch.response_ids[0, 5] == same.eos_token_id and batch.response_mask[0, 5] and not batch.response_mask[0, 6]


def test_a_cut_response_has_no_eos(tokenizer):
    batch = make_batch(tokenizer, ["i liked the plot ."], ["the cast was weak . i liked the plot ."], 6)
    assert batch.response_mask.sum() == 6 and tokenizer.eos_token_id not in batch.response_ids


@pytest.mark.parametrize("top_p, kept", [(0.4, {0}), (0.79, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_nucleus_keeps_the_smallest_set_that_reaches_top_p(top_p, kept):
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = torch.empty(4000, 4).exponential_(generator=stream(0, "p"))
    tokens = P.next_token(probs.log().repeat(4000, 1), noise, 1.0, top_p)
    assert set(tokens.tolist()) == kept
    share = (tokens == 0).float().mean().item()
    assert share == pytest.approx((probs[0] / probs[list(kept)].sum()).item(), abs=0.03)  # what stays is renormalised


def test_a_row_draws_the_same_whatever_stands_beside_it(policy, tokenizer):
    """Each row has noise of its own, so a row's response survives other rows' changing."""
    texts = []
    for prompts in (PROMPTS, [PROMPTS[0], PROMPTS[0], PROMPTS[2]]):
        responses = sample_tokens(policy, tokenizer, pad_prompts(tokenizer, prompts), 12, stream(0, "r"))
        texts.append(decode(tokenizer, *responses))
    assert texts[0][0] == texts[1][0] and texts[0][2] == texts[1][2]


def test_k_responses_of_a_prompt_are_those_of_k_copies_of_it(model, tokenizer, monkeypatch):
    """One pass over the prompt serves all k; rows that end leave the batch; neither changes what is drawn."""
    ids, mask = pad_prompts(tokenizer, PROMPTS)
    copied = ids.repeat_interleave(10, 0), mask.repeat_interleave(10, 0)
    together = sample_tokens(model, tokenizer, (ids, mask), 16, stream(0, "k"), temperature=2.0, k=10)
    copies = sample_tokens(model, tokenizer, copied, 16, stream(0, "k"), temperature=2.0)
    lengths = together[1].sum(1)
    assert lengths.min() < 5 and lengths.max() > 8  # some rows left early, some went on
    assert torch.equal(together[0], copies[0]) and torch.equal(together[1], copies[1])
    monkeypatch.setattr(P, "rows_that_go_on", lambda alive: torch.arange(len(alive)))  # nobody leaves early
    kept = sample_tokens(model, tokenizer, (ids, mask), 16, stream(0, "k"), temperature=2.0, k=10)
    assert torch.equal(together[0], kept[0]) and torch.equal(together[1], kept[1])


def test_the_smallest_quotient_wins_the_race():
    """Token v arrives after E_v / p_v; one of no probability never does."""
    probs = torch.tensor([[0.0, 0.25, 0.75, 0.0]])
    for noise, token in (([1e-6, 1.0, 3.1, 1e-6], 1), ([1e-6, 1.0, 2.9, 1e-6], 2), ([9.0, 0.1, 2.0, 9.0], 1)):
        assert P.next_token(probs.log(), torch.tensor([noise])).item() == token


def test_two_policies_that_hardly_differ_draw_the_same_tokens():
    """With shared noise draws from p and q differ with probability at most 2 TV / (1 + TV), where TV is their total
    variation, 1/2 sum |p - q|. By inverse distribution functions it can be many times that."""
    logits = torch.randn(1, 5000, generator=stream(0, "p")).repeat(4000, 1)
    nudged = logits + 0.02 * torch.randn(1, 5000, generator=stream(0, "q"))
    p, q = logits[0].softmax(0), nudged[0].softmax(0)
    tv = 0.5 * (p - q).abs().sum().item()
    noise = torch.empty(4000, 5000).exponential_(generator=stream(0, "noise"))
    equal = (P.next_token(logits, noise) == P.next_token(nudged, noise)).float().mean().item()
    uniform = torch.rand(4000, 1, generator=stream(0, "u"))
    inverse = [torch.searchsorted(probs.cumsum(0), uniform) for probs in (p, q)]
    assert 1 - equal < 2 * tv / (1 + tv) + 0.01
    assert (inverse[0] == inverse[1]).float().mean() < 1 - 5 * tv


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_against_reference(reference, temperature):
    inputs, outputs = reference(f"logprobs_from_logits_temperature_{temperature}")
    ours = P.log_probs_of(inputs["logits"], inputs["ids"], temperature)
    assert torch.allclose(ours.double(), outputs["logprobs"], atol=1e-5)


def test_entropy_of_a_known_distribution():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]]]))
    assert P.entropy_of(logits).item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_models_are_ordinary_hugging_face_folders(policy, tokenizer, tmp_path):
    save(tmp_path, policy, tokenizer)
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = words("the plot was dull .", return_tensors="pt")["input_ids"]
    assert torch.equal(again(ids).logits, policy(ids).logits)
    assert words.decode(ids[0]) == "the plot was dull ."
    scalar = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert scalar.score.weight.shape == (1, 32)


def test_streams_depend_on_every_name():
    names = [(0, "a", 1), (0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 11)]
    numbers = [tuple(torch.rand(3, generator=stream(*name)).tolist()) for name in names]
    assert numbers[0] == numbers[1] and len(set(numbers)) == 5


def test_sampling_ignores_and_leaves_the_global_random_state(policy, tokenizer):
    prompts, results = pad_prompts(tokenizer, PROMPTS), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(sample_tokens(policy, tokenizer, prompts, 8, stream(5, "x"))[0])
        assert torch.initial_seed() == seed
    assert torch.equal(*results)


# ---------------------------------------------------------------------------------------------------- precision


def test_heads_stay_in_fp32_when_products_are_bf16(model, tokenizer, tmp_path):
    """In bf16 a logit of 64 could be off by a quarter, and many rewards would be equal."""
    save(tmp_path, model, tokenizer)
    scalar = scalar_model(str(tmp_path), tokenizer.pad_token_id)
    torch.nn.init.normal_(scalar.score.weight, generator=stream(0, "head"))
    batch, sequences = (
        make_batch(tokenizer, PROMPTS, RESPONSES, 24),
        [[5, 6, 7 + i % 30, 8 + i // 30] for i in range(128)],
    )
    full = P.response_log_probs(model, batch)
    for network in (model, scalar):
        forward.compute_in(network, torch.bfloat16)
    logits, states = P.response_logits(model, batch)
    by_hand = states.float() @ model.get_output_embeddings().weight.T
    assert logits.dtype == torch.float32 and torch.allclose(logits, by_hand, atol=1e-4)
    assert not torch.equal(P.response_log_probs(model, batch), full)  # the blocks did round
    cached = forward.Cache(model, batch.prompt_mask, 4).next_logits(batch.prompt_ids)
    assert cached.dtype == torch.float32 and torch.allclose(cached, logits[:, 0], atol=0.3)
    assert len(set(forward.sequence_logits(scalar, sequences, 0).flatten().tolist())) > 125
    assert P.response_values(scalar, batch).dtype == torch.float32
    assert "forward" not in vars(model.get_output_embeddings())  # the library's head is its own again


class Casts(TorchDispatchMode):
    """Counts casts of matrices to bf16, by the matrix."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16 and args[0].requires_grad:
            self.counts[id(args[0])] = self.counts.get(id(args[0]), 0) + 1
        return result


def test_sampling_casts_each_weight_once(model, tokenizer):
    forward.compute_in(model, torch.bfloat16)
    with Casts() as casts:
        sample_tokens(model, tokenizer, pad_prompts(tokenizer, PROMPTS), 8, stream(0, "casts"), temperature=9.0)
    matrices = [p for block in model.base_model.children() for p in block.parameters() if p.dim() == 2]
    assert len(casts.counts) >= 8 and set(casts.counts.values()) == {1} and len(casts.counts) <= 2 * len(matrices)


def test_the_librarys_cache_is_kept_in_bf16(tokenizer):
    network = forward.compute_in(llama(tokenizer), torch.bfloat16)
    ids, mask = pad_prompts(tokenizer, PROMPTS)
    cache = forward.Cache(network, mask, 4)
    with forward.sampling(network):
        cache.next_logits(ids)
    assert all(layer.keys.dtype == layer.values.dtype == torch.bfloat16 for layer in cache.library.layers)


def test_other_models_of_the_library_still_make_their_own_masks(tokenizer):
    """BLOOM reads its positions from the mask, and has no rotations: it gets the mask as it is."""
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    torch.manual_seed(0)
    bloom = AutoModelForCausalLM.from_config(config).eval()
    batch = make_batch(tokenizer, PROMPTS, RESPONSES, 24)
    log_probs = P.response_log_probs(bloom, batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        alone = plain_log_probs(bloom, tokenizer, prompt, response)
        assert log_probs[row][batch.response_mask[row]].tolist() == pytest.approx(alone, abs=2e-4)
