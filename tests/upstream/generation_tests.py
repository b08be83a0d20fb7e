# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Stands in for `tests/generation/test_utils.py`: generation, held against forward passes without a cache."""

import copy

import torch
from transformers import ContinuousBatchingConfig, DynamicCache, StaticCache

PROMPT_LENGTH = 6
NEW_TOKENS = 5


class GenerationTesterMixin:
    """Tests of `generate` and of everything that it leans on: caches, masks, positions, sliced logits."""

    # float32 on the CPU: other shapes take other matmul kernels, which differ by a few last places
    tolerance = {"atol": 1e-5, "rtol": 1e-4}

    def generative_models(self):
        """Yield each generative model, in evaluation mode and never ending a sequence by chance, with a prompt."""
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None
            yield model, inputs["input_ids"][:3, :PROMPT_LENGTH]

    def generate(self, model, *arguments, **options):
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
        return model.generate(*arguments, **options)

    @torch.no_grad()
    def greedy_by_hand(self, model, input_ids, steps=NEW_TOKENS):
        """Greedy decoding that recomputes the whole sequence for each new token: slow, but no cache to break."""
        for _ in range(steps):
            logits = model(input_ids, use_cache=False).logits
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    @torch.no_grad()
    def log_probabilities(self, model, sequences):
        """The log-probability of every token after the prompt, from one forward pass over the finished sequences."""
        logits = model(sequences, use_cache=False).logits.log_softmax(-1)
        return logits[:, :-1].gather(-1, sequences[:, 1:, None]).squeeze(-1)[:, PROMPT_LENGTH - 1 :]

    def test_greedy_generation_equals_full_forward_passes(self):
        for model, prompt in self.generative_models():
            expected = self.greedy_by_hand(model, prompt)
            for use_cache in (True, False):
                torch.testing.assert_close(self.generate(model, prompt, use_cache=use_cache), expected)

    def test_generation_with_a_static_cache_equals_a_dynamic_one(self):
        for model, prompt in self.generative_models():
            static = self.generate(model, prompt, cache_implementation="static", disable_compile=True)
            torch.testing.assert_close(static, self.generate(model, prompt, cache_implementation="dynamic"))

    def test_generation_stops_at_the_end_of_sequence_and_pads_the_rest(self):
        for model, prompt in self.generative_models():
            free = self.generate(model, prompt, pad_token_id=0)
            end = free[0, PROMPT_LENGTH + 1].item()
            stopped = self.generate(model, prompt, pad_token_id=0, eos_token_id=end)
            for row, expected in zip(stopped, free, strict=True):
                ends = (expected[PROMPT_LENGTH:] == end).nonzero()
                length = PROMPT_LENGTH + (ends[0].item() + 1 if len(ends) else NEW_TOKENS)
                torch.testing.assert_close(row[:length], expected[:length])
                assert (row[length:] == 0).all()

    def test_beam_search_scores_are_the_log_probabilities_of_its_sequences(self):
        for model, prompt in self.generative_models():
            output = self.generate(
                model, prompt, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
            )
            log_probabilities = self.log_probabilities(model, output.sequences).sum(-1)
            # beam search divides by the number of new tokens (length_penalty is 1)
            torch.testing.assert_close(output.sequences_scores, log_probabilities / NEW_TOKENS, **self.tolerance)
            best, second = output.sequences_scores.view(-1, 2).unbind(-1)
            assert (best >= second).all()
            first, other = output.sequences.view(len(prompt), 2, -1).unbind(1)
            assert (first != other).any(-1).all(), "a beam was returned twice"

    def test_sampling_draws_from_the_logits_and_repeats_with_the_seed(self):
        for model, prompt in self.generative_models():
            runs = []
            for _ in range(2):
                torch.manual_seed(3)
                runs.append(
                    self.generate(
                        model,
                        prompt,
                        do_sample=True,
                        temperature=0.5,
                        top_k=0,
                        return_dict_in_generate=True,
                        output_scores=True,
                    )
                )
            torch.testing.assert_close(runs[0].sequences, runs[1].sequences)
            with torch.no_grad():
                logits = model(runs[0].sequences, use_cache=False).logits[:, PROMPT_LENGTH - 1 : -1]
            torch.testing.assert_close(torch.stack(runs[0].scores, 1), logits / 0.5, **self.tolerance)

    def test_assisted_decoding_equals_greedy_decoding(self):
        for model, prompt in self.generative_models():
            prompt = prompt[:1]  # assistance takes one sequence at a time
            expected = self.greedy_by_hand(model, prompt, steps=10)
            stranger = type(model)(model.config).eval()  # rarely guesses right, so its tokens are taken back
            stranger.generation_config.eos_token_id = None
            for options in (
                {"assistant_model": stranger},
                {"assistant_model": copy.deepcopy(model)},  # always guesses right
                {"prompt_lookup_num_tokens": 3},
            ):
                generated = self.generate(model, prompt, max_new_tokens=10, **options)
                torch.testing.assert_close(generated, expected)

    def test_left_padding_does_not_change_what_is_generated(self):
        for model, prompt in self.generative_models():
            padding = torch.zeros(len(prompt), 4, dtype=prompt.dtype)
            attention_mask = torch.cat([padding, torch.ones_like(prompt)], dim=1)
            padded = self.generate(model, torch.cat([padding, prompt], dim=1), attention_mask=attention_mask)
            torch.testing.assert_close(padded[:, 4:], self.generate(model, prompt))

    def test_a_prompt_is_continued_alike_alone_and_beside_a_longer_one(self):
        for model, prompt in self.generative_models():
            short, long = prompt[0, :3], prompt[1]
            batch = torch.stack([torch.cat([torch.zeros(len(long) - 3, dtype=short.dtype), short]), long])
            together = self.generate(model, batch, attention_mask=(batch != 0).long(), pad_token_id=0)
            alone = self.generate(model, short[None])
            torch.testing.assert_close(together[0, len(long) :], alone[0, 3:])

    def test_generation_from_embeddings_equals_generation_from_tokens(self):
        for model, prompt in self.generative_models():
            embeddings = model.get_input_embeddings()(prompt).detach()
            # embeddings have no tokens to give back: only the new ones come out
            generated = self.generate(model, inputs_embeds=embeddings)
            torch.testing.assert_close(generated, self.generate(model, prompt)[:, PROMPT_LENGTH:])

    def test_generation_goes_on_from_the_cache_of_an_earlier_call(self):
        for model, prompt in self.generative_models():
            begun = self.generate(model, prompt, return_dict_in_generate=True)
            extended = self.generate(model, begun.sequences, past_key_values=begun.past_key_values)
            torch.testing.assert_close(extended, self.generate(model, prompt, max_new_tokens=2 * NEW_TOKENS))

    @torch.no_grad()
    def test_a_prompt_read_in_pieces_gives_the_same_logits(self):
        for model, prompt in self.generative_models():
            expected = model(prompt, use_cache=False).logits
            for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=16)):
                pieces = [
                    model(piece, past_key_values=cache, position_ids=position_ids).logits
                    for piece, position_ids in zip(
                        prompt.split([1, 2, 3], dim=1),
                        torch.arange(PROMPT_LENGTH)[None].split([1, 2, 3], dim=1),
                        strict=True,
                    )
                ]
                torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **self.tolerance)

    @torch.no_grad()
    def test_packed_sequences_do_not_see_each_other(self):
        for model, prompt in self.generative_models():
            alone = [model(row[None], use_cache=False).logits for row in prompt]
            position_ids = torch.arange(PROMPT_LENGTH).repeat(len(prompt))[None]
            packed = model(prompt.reshape(1, -1), position_ids=position_ids, use_cache=False).logits
            torch.testing.assert_close(packed, torch.cat(alone, dim=1), **self.tolerance)

    @torch.no_grad()
    def test_logits_to_keep_are_a_slice_of_all_logits(self):
        for model, prompt in self.generative_models():
            logits = model(prompt).logits
            chosen = torch.tensor([0, 3, 5])
            for keep, expected in ((0, logits), (1, logits[:, -1:]), (4, logits[:, -4:]), (chosen, logits[:, chosen])):
                torch.testing.assert_close(model(prompt, logits_to_keep=keep).logits, expected, **self.tolerance)

    def test_generation_returns_what_it_is_asked_for(self):
        for model, prompt in self.generative_models():
            model.set_attn_implementation("eager")  # the only one that has attention weights to return
            output = self.generate(
                model,
                prompt,
                return_dict_in_generate=True,
                output_logits=True,
                output_attentions=True,
                output_hidden_states=True,
            )
            layers = model.config.num_hidden_layers
            assert len(output.logits) == NEW_TOKENS
            assert [len(step) for step in output.hidden_states] == [layers + 1] * NEW_TOKENS
            assert [len(step) for step in output.attentions] == [layers] * NEW_TOKENS
            for step, (states, weights) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
                queries = PROMPT_LENGTH if step == 0 else 1
                assert states[-1].shape == (len(prompt), queries, model.config.hidden_size)
                shape = (len(prompt), model.config.num_attention_heads, queries, PROMPT_LENGTH + step)
                assert weights[-1].shape == shape
            torch.testing.assert_close(
                torch.stack(output.logits, 1).argmax(-1), output.sequences[:, PROMPT_LENGTH:], msg="not greedy"
            )

    def test_generation_in_half_precision_stays_finite(self):
        for dtype in (torch.bfloat16, torch.float16):
            for model, prompt in self.generative_models():
                output = self.generate(model.to(dtype), prompt, return_dict_in_generate=True, output_logits=True)
                assert output.sequences.shape[1] == PROMPT_LENGTH + NEW_TOKENS
                assert torch.stack(output.logits).isfinite().all()

    @torch.no_grad()
    def test_decoding_compiles_to_one_graph(self):
        for model, prompt in self.generative_models():
            if not model._can_compile_fullgraph:
                self.skipTest(f"{type(model).__name__} does not claim to compile to one graph")
            torch._dynamo.reset()
            # the graph is what may break; code generation below it would only cost time
            step = torch.compile(model.forward, fullgraph=True, backend="eager")
            sequences, cache = prompt, StaticCache(model.config, max_cache_len=16)
            new, seen = prompt, 0
            for _ in range(NEW_TOKENS):
                position_ids = torch.arange(seen, seen + new.shape[1])[None]
                # a prompt and then single tokens: two graphs, and the third length must not bring a third
                with torch.compiler.set_stance("default" if seen <= PROMPT_LENGTH else "fail_on_recompile"):
                    logits = step(new, past_key_values=cache, position_ids=position_ids).logits
                seen += new.shape[1]
                new = logits[:, -1:].argmax(-1)
                sequences = torch.cat([sequences, new], dim=1)
            torch.testing.assert_close(sequences, self.greedy_by_hand(model, prompt))

    def test_continuous_batching_equals_generation(self):
        for model, prompt in self.generative_models():
            expected = self.generate(model, prompt)[:, PROMPT_LENGTH:].tolist()
            options = copy.deepcopy(model.generation_config)
            options.update(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
            # its cache takes most of the machine's memory unless told how much it needs
            cache = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
            outputs = model.generate_batch(
                prompt.tolist(), generation_config=options, continuous_batching_config=cache
            )
            by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
            assert [by_prompt[tuple(row)] for row in prompt.tolist()] == expected
