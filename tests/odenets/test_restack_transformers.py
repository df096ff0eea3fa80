"""Models of transformers, restacked, against themselves as they were: randomly initialised, four layers, width 16."""

import copy
import functools
import warnings

import pytest
import torch

from odenets import Restacked, RestackWarning, restack, unrestack
from odenets.backprop.meter import meter_on
from schemes import SchemeError

transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "odenets[hf]"')

D = torch.float64
SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
PICTURE = {**SMALL, "image_size": 16, "patch_size": 4, "num_labels": 3}
TEXT = {**SMALL, "vocab_size": 40, "max_position_embeddings": 32}
GPT2 = {"n_embd": 16, "n_layer": 4, "n_head": 2, "vocab_size": 40, "n_positions": 32}
# Class of the model, of its configuration, options, and where its blocks lie.
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", PICTURE, "vit.layers"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", PICTURE, "deit.layers"),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, "bert.encoder.layer"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "transformer.h"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 1}, "model.layers"),
}
CAUSAL = ("gpt2", "llama")
NO_CACHE = {name: {"use_cache": False} if name in CAUSAL else {} for name in MODELS}


@functools.cache
def made(name, depth=4):
    kind, config, options, _ = MODELS[name]
    torch.manual_seed(0)
    options = {**options, **{k: depth for k in ("num_hidden_layers", "n_layer") if k in options}}
    given = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} if name in CAUSAL else {}
    return getattr(transformers, kind)(getattr(transformers, config)(**options, **given)).to(D)


def build(name, depth=4):
    return copy.deepcopy(made(name, depth)).eval()


def restacked(name, scheme="euler", backprop="store", depth=4, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "restack: under", RestackWarning)
        return restack(build(name, depth), MODELS[name][3], scheme, backprop, **options)


def inputs(name, n=3, length=7):
    draw = torch.Generator().manual_seed(1)
    if MODELS[name][2] is PICTURE:
        return {"pixel_values": torch.randn(n, 3, 16, 16, generator=draw, dtype=D)}
    mask = torch.ones(n, length, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": torch.randint(3, 40, (n, length), generator=draw), "attention_mask": mask}


def step(model, given, seed=0):
    """The loss, and all gradients of a training step as one vector."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**given).logits.square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_evaluation_are_those_of_the_model(name):
    given, plain = inputs(name), build(name)
    with torch.no_grad():
        want = plain(**given).logits
        for scheme, backprop in (("euler", "store"), ("euler", "checkpoint"), ("bdia", "exact"), ("bdia", "store")):
            net = restacked(name, scheme, backprop)
            assert list(net.state_dict()) == list(plain.state_dict())
            torch.testing.assert_close(net(**given).logits, want, rtol=0, atol=1e-12)
        single = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
        torch.testing.assert_close(net.float()(**single).logits, plain.float()(**single).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_under_euler_are_those_of_the_model(name):
    given = inputs(name) | NO_CACHE[name]
    loss, want = step(build(name).train(), given)  # with dropout
    for backprop in ("store", "checkpoint", "checkpoint(2)"):
        other, got = step(restacked(name, "euler", backprop).train(), given)
        assert abs(other - loss) <= 1e-12 * abs(loss)
        assert (got - want).norm() <= 1e-10 * want.norm()


@pytest.mark.cases(5)
@pytest.mark.parametrize(("scheme", "backprop"), [("bdia", "exact"), ("momentum(9/10)", "reverse")])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_modes_that_reverse_are_those_of_the_stored_run(name, scheme, backprop):
    given = inputs(name) | NO_CACHE[name]
    stored = "exact(store=true)" if backprop == "exact" else "store"
    loss, want = step(restacked(name, scheme, stored).train(), given)
    other, got = step(restacked(name, scheme, backprop).train(), given)
    assert abs(other - loss) <= 1e-9 * abs(loss)
    assert (got - want).norm() <= 1e-8 * want.norm()


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_what_is_kept_hardly_grows_with_the_depth(name):
    given = inputs(name, 16) | NO_CACHE[name]

    def kept(model):
        step(model.train(), given)
        with meter_on(torch.device("cpu")) as meter:
            meter.mark()
            loss = model(**given).logits.sum()
            meter.mark()
        del loss
        return meter.intervals[1].start

    grows = {}
    for scheme in (None, "bdia"):
        nets = [restacked(name, scheme, "exact", depth) if scheme else build(name, depth) for depth in (2, 6)]
        grows[scheme] = (kept(nets[1]) - kept(nets[0])) / 4
    assert grows["bdia"] < 0.03 * grows[None], grows


@pytest.mark.parametrize("backprop", ["checkpoint", "exact"])
@pytest.mark.parametrize("name", CAUSAL)
def test_the_default_cache_is_dropped_in_training(name, backprop):
    scheme = "euler" if backprop == "checkpoint" else "bdia"
    loss, want = step(restacked(name, scheme, backprop).train(), inputs(name) | NO_CACHE[name])
    with pytest.warns(RestackWarning, match="the cache of .* is dropped"):
        other, got = step(restacked(name, scheme, backprop).train(), inputs(name))
    assert other == loss and torch.equal(got, want)


@pytest.mark.parametrize("scheme", ["euler", "bdia", "midpoint"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_a_cache_is_that_without(name, scheme):
    backprop = "store" if scheme == "midpoint" else "checkpoint"
    net, ids = restacked(name, scheme, backprop), inputs(name)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    found = [net.generate(ids, attention_mask=torch.ones_like(ids), use_cache=c, **options) for c in (True, False)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].scores, found[1].scores, rtol=0, atol=1e-10)
    if scheme != "midpoint":
        plain = build(name).generate(ids, attention_mask=torch.ones_like(ids), **options)
        torch.testing.assert_close(found[0].scores, plain.scores, rtol=0, atol=1e-10)
    with pytest.raises(SchemeError, match="evaluates a block more than once a pass"):
        restacked(name, "reversible(euler)").generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_after_the_steps(name):
    given = inputs(name) | NO_CACHE[name]
    with torch.no_grad():
        want = build(name)(**given, output_hidden_states=True).hidden_states
        for backprop in ("store", "exact"):
            got = restacked(name, "bdia", backprop)(**given, output_hidden_states=True).hidden_states
            assert len(got) == len(want) == 5
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    net = restacked(name, "midpoint")
    with torch.no_grad():
        got = net(**given, output_hidden_states=True).hidden_states
    blocks = net.get_submodule(MODELS[name][3])
    seen = []
    handle = blocks.stack.register_forward_hook(
        lambda m, args, kwargs, y: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        net(**given)
        (x,), kwargs = seen[0]
        states = blocks.stack.trajectory(x, **kwargs)
    handle.remove()
    assert len(got) == 3
    torch.testing.assert_close(got[0], x, rtol=0, atol=0)
    torch.testing.assert_close(got[1], states[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("chosen", [[0, -1], [2]])
def test_hidden_states_are_chosen_by_number_as_the_model_does(name, chosen):
    given = inputs(name) | NO_CACHE[name] | {"output_hidden_states": chosen}
    with torch.no_grad():
        want = build(name)(**given).hidden_states
        got = restacked(name, "bdia", "exact")(**given).hidden_states
        assert [s is None for s in got] == [s is None for s in want] and 0 < sum(s is None for s in want) < 5
        torch.testing.assert_close(*([s for s in h if s is not None] for h in (got, want)), rtol=0, atol=1e-10)
        with pytest.raises(SchemeError, match=r"4 blocks of '.*' make 2 under midpoint\.\n  Ask for all of them"):
            restacked(name, "midpoint")(**given)


@pytest.mark.parametrize(("scheme", "backprop"), [("euler", "store"), ("bdia", "exact")])
def test_hidden_states_of_stages_are_not_the_blocks(scheme, backprop):
    """ConvNeXt collects the outputs of the stages around its blocks, which a stack inside of them leaves alone."""
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[4, 4, 6, 6], depths=[2, 2, 3, 2], num_labels=3)
    net, x = transformers.ConvNextForImageClassification(config).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = net(x, output_hidden_states=True).hidden_states
        got = restack(net, "convnext.encoder.stages.*.layers", scheme, backprop)(x, output_hidden_states=True)
    assert len(want) == 5
    torch.testing.assert_close(got.hidden_states, want, rtol=0, atol=1e-5)


def test_hidden_states_from_inside_of_blocks_are_refused():
    """No model says so today; a hook of transformers on a module in a block stands for one."""
    net, given = restacked("vit", "bdia"), inputs("vit") | {"output_hidden_states": True}
    net(**given)
    blocks = net.get_submodule("vit.layers")
    for block in blocks._modules.values():
        hooks = block._forward_hooks
        block.mlp._forward_hooks.update({key: hooks.pop(key) for key in list(hooks)})
    with pytest.raises(SchemeError, match="collects hidden states inside of the blocks"):
        net(**given)


def test_hidden_states_have_gradients_in_every_mode():
    found = []
    for backprop in ("store", "exact"):
        net = restacked("vit", "bdia", "exact(store=true)" if backprop == "store" else backprop).train()
        torch.manual_seed(3)
        states = net(**inputs("vit"), output_hidden_states=True).hidden_states
        sum(s.square().mean() for s in states).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() <= 1e-8 * found[0].norm()


def test_attention_weights_come_from_the_blocks():
    net, plain, given = restacked("vit", "bdia", "exact"), build("vit"), inputs("vit")
    for model in (net, plain):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        got, want = (m(**given, output_attentions=True).attentions for m in (net, plain))
    assert len(got) == len(want) == 4
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_models_are_saved_and_loaded_before_and_after(name, tmp_path):
    net, given = restacked(name, "bdia", "exact"), inputs(name)
    net.save_pretrained(tmp_path)
    loaded = type(net).from_pretrained(tmp_path, dtype=D).eval()
    assert not isinstance(loaded.get_submodule(MODELS[name][3]), Restacked)
    with torch.no_grad():
        want = net(**given).logits
        torch.testing.assert_close(loaded(**given).logits, want, rtol=0, atol=1e-12)
        restack(loaded, MODELS[name][3], "bdia", "exact")
        # What is loaded may lie unaligned in the file's memory, where other kernels multiply it.
        for p in loaded.parameters():
            p.data = p.data.clone()
        torch.testing.assert_close(loaded(**given).logits, want, rtol=0, atol=0)
        torch.testing.assert_close(unrestack(loaded)(**given).logits, want, rtol=0, atol=1e-12)


@pytest.mark.cases(2)
@pytest.mark.parametrize("first", ["restack", "adapt"])
@pytest.mark.parametrize(("name", "target"), [("vit", "q_proj"), ("llama", "q_proj")])
def test_adapters_train_merge_and_load(name, target, first, tmp_path):
    peft = pytest.importorskip("peft", reason='needs peft: pip install "odenets[hf]"')
    given = inputs(name) | NO_CACHE[name]

    def adapted(model):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=[target], r=2, lora_alpha=4, init_lora_weights=False)
        return peft.get_peft_model(model, config)

    if first == "restack":
        net = adapted(restacked(name, "bdia", "exact"))
    else:
        net = adapted(build(name))
        restack(net, f"base_model.model.{MODELS[name][3]}", "bdia", "exact")
    net.train()
    net(**given).logits.square().mean().backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert len(trained) == 8 and all(p.grad is not None and p.grad.any() for p in trained)
    net.eval()
    with torch.no_grad():
        want = net(**given).logits
        plain = adapted(build(name)).eval()
        torch.testing.assert_close(plain(**given).logits, want, rtol=0, atol=1e-10)
        net.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
        torch.testing.assert_close(loaded(**given).logits, want, rtol=0, atol=1e-10)
        torch.testing.assert_close(net.merge_and_unload()(**given).logits, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backprop", ["store", "exact"])
def test_gradient_checkpointing_of_the_model_changes_no_gradient(backprop):
    stored = "exact(store=true)" if backprop == "exact" else "store"
    loss, want = step(restacked("vit", "bdia", stored).train(), inputs("vit"))
    net = restacked("vit", "bdia", backprop).train()
    net.gradient_checkpointing_enable()
    other, got = step(net, inputs("vit"))
    assert abs(other - loss) <= 1e-10 * abs(loss) and (got - want).norm() <= 1e-8 * want.norm()


def test_a_model_that_hands_values_from_block_to_block_is_refused():
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    net = transformers.T5EncoderModel(config).eval()
    restack(net, "encoder.block")
    with pytest.raises(SchemeError, match=r"restack: "):
        net(input_ids=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_restacked_model_is_exported(name):
    net, given = restacked(name, "bdia", "exact"), inputs(name)
    program = torch.export.export(net, (), given)
    torch.testing.assert_close(program.module()(**given).logits, net(**given).logits, rtol=0, atol=1e-10)


@pytest.mark.long
def test_the_trainer_trains_a_restacked_model(tmp_path):
    pytest.importorskip("accelerate", reason='needs accelerate: pip install "odenets[hf]"')
    given = inputs("vit", 8)
    rows = [{"pixel_values": x.float(), "labels": i % 3} for i, x in enumerate(given["pixel_values"])]
    net = restacked("vit", "bdia", "exact", seed=1).float()
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 16, "learning_rate": 1e-2, "report_to": "none"}
    arguments = transformers.TrainingArguments(
        str(tmp_path), save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", **options
    )
    trainer = transformers.Trainer(model=net, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    trainer.save_model(tmp_path / "saved")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "saved").eval()
    x = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, net.eval()(x).logits, rtol=0, atol=1e-5)
