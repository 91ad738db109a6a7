"""Full fine-tuning: one process at every ZeRO stage against plain PyTorch, its checkpoints, its exported model."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from transformers import AutoModelForCausalLM, AutoTokenizer

from ardtrain import schedule
from ardtrain.engines import AdamSettings
from ardtrain.engines_full import FullEngine
from ardtrain.evaluation import token_loss_sum
from ardtrain.full import FullTrainer, write_model
from ardtrain.ranks import named_seed
from ardtrain.trainer import Hooks, LoopState
from tests.tiny import (
    CPU,
    LOOP,
    HeldOutBatches,
    TokenBatches,
    equal_bits,
    save_tiny_llama,
    single_world,
    tiny_llama,
)

pytestmark = pytest.mark.usefixtures("world")
STEPS = 20
CLIPPING = 1.25  # some steps have a smaller norm, some a larger one: asserted
ADAM = AdamSettings(weight_decay=0.01)


def full_config(stage=1, *, clipping=CLIPPING, dtype=None, offload=False, **zero):
    """As deepspeed_config.split_deepspeed makes it for `full` on one process; every weight is sharded."""
    zero = {"stage": stage, "reduce_bucket_size": 100_000, **zero}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": clipping,
        "zero_optimization": zero,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    if dtype == torch.bfloat16:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config


SETTINGS = {
    "stage 1": full_config(1),
    "stage 2": full_config(2),
    "stage 3": full_config(3),
    "stage 2, offload": full_config(2, offload=True),
    "stage 3, offload": full_config(3, offload=True),
}


def cases(table):
    """Parameters of a table; offload and most of bf16 run with the long tests."""
    long = {name for name in table if "offload" in name or name in ("bf16 stage 1", "bf16 stage 2")}
    rows = {name: value if isinstance(value, tuple) else (value,) for name, value in table.items()}
    return [pytest.param(*row, id=name, marks=[pytest.mark.full] * (name in long)) for name, row in rows.items()]


each_setting = pytest.mark.parametrize("config", cases(SETTINGS))
PERSISTENT = {**full_config(3), "zero_optimization": {"stage": 3, "reduce_bucket_size": 100_000}}  # small weights whole
each_stage = pytest.mark.parametrize("stage", [1, 2, 3])


@pytest.fixture
def trainers():
    """Makes trainers of a one-layer model and ends their engines."""
    made = []

    def make(config=None, *, model=None, data=None, adam=ADAM, **loop):
        model = tiny_llama(layers=1) if model is None else model
        engine = FullEngine(model, config=config or full_config(), adam=adam, device=CPU)
        engine.module.train()
        settings = replace(LOOP, **{"total_steps": STEPS, **loop})
        made.append(FullTrainer(settings, single_world(), engine, data or TokenBatches()))
        return made[-1]

    yield make
    for trainer in made:
        trainer.backbone.destroy()


class Short(TokenBatches):
    """The last global batch has a single grain."""

    def grains(self, step):
        return super().grains(step)[: 1 if step == STEPS - 1 else None]


def dropping_llama():
    model = tiny_llama(layers=1)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model


def plain_run(model, data, *, clipping=CLIPPING, steps=STEPS):
    """Losses and norms of torch's AdamW over the same grains, gradient of the global mean, clipped; no DeepSpeed."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=ADAM.weight_decay)
    losses, norms = [], []
    for step in range(steps):
        batches = [data.collate(g) for g in data.grains(step)]
        num_targets = sum(b.num_target_tokens for b in batches)
        optimizer.zero_grad()
        total = 0.0
        for index, batch in enumerate(batches):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(named_seed(LOOP.seed, step, index))
                loss = token_loss_sum(model, batch, device=CPU)
                (loss / num_targets).backward()
            total += loss.item()
        losses.append(total / num_targets)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clipping or math.inf).item())
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(
            step, peak=LOOP.learning_rate, total_steps=STEPS, warmup_steps=LOOP.warmup_steps, kind="linear"
        )
        optimizer.step()
    return losses, norms


def assert_near(weights, model, atol=1e-5):
    named = dict(model.named_parameters())
    assert set(named) <= set(weights)
    for name, parameter in named.items():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0.0, atol=atol, msg=name)


# ---- the step ----


@each_setting
def test_run_equals_plain_pytorch(trainers, config):
    """Unequal grains, clipping that bites at some steps, weight decay, and a last global batch of one grain."""
    model, data = tiny_llama(), Short()
    start = tiny_llama()
    losses, norms = plain_run(model, data)
    assert min(norms) < CLIPPING < max(norms)
    trainer = trainers(config, model=start, data=data)
    results = [trainer.train_step() for _ in range(STEPS)]
    assert [r.loss for r in results] == pytest.approx(losses, abs=1e-6)
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-4)
    assert_near(trainer.backbone.full_state_dict(), model)
    assert trainer.state.step == STEPS


@each_stage
def test_dropout_is_seeded_by_run_step_and_grain(trainers, stage):
    losses, _ = plain_run(dropping_llama(), TokenBatches(), steps=5)
    trainer = trainers(full_config(stage), model=dropping_llama())
    torch.manual_seed(2)  # the global generator is nobody's
    state = torch.random.get_rng_state()
    ours = [trainer.train_step().loss for _ in range(5)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ours == pytest.approx(losses, abs=1e-6)
    without, _ = plain_run(tiny_llama(layers=1), TokenBatches(), steps=1)
    assert abs(without[0] - losses[0]) > 1e-3  # dropout does something


def test_counts_and_sums_of_a_step(trainers):
    trainer = trainers(full_config(2))
    batches = [trainer.data.collate(g) for g in trainer.data.grains(0)]
    result = trainer.train_step()
    assert result.num_targets == sum(b.num_target_tokens for b in batches)
    assert result.num_tokens == sum(b.num_tokens for b in batches) == trainer.state.tokens_seen
    assert (result.step, result.extra_loss, result.void) == (0, 0.0, False)
    assert trainer.backbone.grad_norm == result.grad_norm


def test_clipping_off_leaves_long_gradients(trainers):
    losses, norms = plain_run(tiny_llama(layers=1), TokenBatches(), clipping=0, steps=8)
    assert max(norms[1:]) > 1.0  # step 0 has a learning rate of 0
    trainer = trainers(full_config(1, clipping=0.0))
    assert [trainer.train_step().loss for _ in range(8)] == pytest.approx(losses, abs=1e-6)


@each_stage
def test_bf16_computes_in_bf16_over_float32_masters(trainers, stage):
    """An update far below bfloat16's spacing is kept: many of them move a weight that one would not."""
    model = tiny_llama(layers=1, dtype=torch.bfloat16)
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    name = "model.norm.weight"  # between 0.8 and 1.2, spacing 2^-8 or 2^-7: one step of 2e-4 rounds away
    before = model.get_parameter(name).detach().clone()
    trainer = trainers(
        full_config(stage, dtype=torch.bfloat16), model=model, adam=AdamSettings(), compute_dtype=torch.bfloat16,
        data=TokenBatches(num_grains=2), learning_rate=2e-4, lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    trainer.train_step()
    assert equal_bits(trainer.backbone.full_state_dict()[name], before)
    assert all(math.isfinite(trainer.train_step().loss) for _ in range(29))
    after = trainer.backbone.full_state_dict()
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert not torch.equal(after[name], before)
    assert equal_bits(model.model.rotary_emb.inv_freq, inv_freq)  # float32, not rounded by the engine


# ---- void steps ----


class Infinite(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def poisoned(trainer, kind, steps):
    """Makes grain 2 of these steps bad, in its loss or in its gradient alone."""
    marked = {}
    collate, plain = trainer.data.collate, trainer.loss_sum

    def remember(grain):
        batch = collate(grain)
        marked[id(batch)] = (grain, batch)
        return batch

    def loss_sum(module, batch, **arguments):
        loss = plain(module, batch, **arguments)
        grain, _ = marked[id(batch)]
        if grain[0] not in steps or grain[1] != 2:
            return loss
        return {"loss": loss + math.inf, "nan": loss * math.nan, "gradient": Infinite.apply(loss)}[kind]

    trainer.data.collate, trainer.loss_sum = remember, loss_sum
    return trainer


VOID = {
    **{f"stage {stage}, {kind}": (full_config(stage), kind) for stage in (1, 2, 3) for kind in ("loss", "gradient")},
    "stage 2, offload, nan": (full_config(2, offload=True), "nan"),
    "stage 3, offload, gradient": (full_config(3, offload=True), "gradient"),
    "bf16 stage 1": (full_config(1, dtype=torch.bfloat16), "loss"),
}


@pytest.mark.parametrize(("config", "kind"), cases(VOID))
def test_void_steps_change_nothing_but_the_count(trainers, config, kind):
    """`loss`: an infinite loss with a finite gradient, which the engine alone would apply."""
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    settings = {"compute_dtype": dtype, "max_skipped_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = poisoned(trainers(config, model=tiny_llama(layers=1, dtype=dtype), **settings), kind, {2, 3})
    straight = trainers(config, model=tiny_llama(layers=1, dtype=dtype), **settings)
    for _ in range(2):
        assert trainer.train_step() == straight.train_step()
    for step in (2, 3):
        before = trainer.backbone.full_state_dict()
        result = trainer.train_step()
        after = trainer.backbone.full_state_dict()
        assert result.void and math.isnan(result.grad_norm)
        assert math.isfinite(result.loss) == (kind == "gradient")
        assert all(equal_bits(before[name], after[name]) for name in before)
        assert (trainer.state.skipped, trainer.state.step) == (step - 1, step + 1)
    straight.state.step = 4  # as if there had been no steps 2 and 3: moments and step counter as well
    for _ in range(4, 7):
        assert trainer.train_step() == straight.train_step()
    assert trainer.state.skipped == 0


def test_too_many_void_steps_stop_the_run(trainers):
    trainer = poisoned(trainers(), "loss", {1})
    trainer.train_step()
    text = r"step 1: loss or gradient is not finite in grains \[2\] \(samples tiny:1.2.0, tiny:1.2.1\); "
    with pytest.raises(RuntimeError, match=text + "max_skipped_steps=0"):
        trainer.train_step()


def test_last_step_may_be_void(trainers):
    trainer = poisoned(trainers(total_steps=2, max_skipped_steps=1), "nan", {1})
    assert trainer.fit() == 0
    assert (trainer.state.step, trainer.state.skipped) == (2, 1)


def test_older_deepspeed_is_refused(monkeypatch):
    """0.19.3 turns a norm that is not finite into 1 and applies the gradient."""
    import deepspeed

    for version in ("0.19.3", "0.9.12", "0.19.7+abc"):
        monkeypatch.setattr(deepspeed, "__version__", version)
        with pytest.raises(ValueError, match="method=full needs DeepSpeed 0.19.8, this is 0.*; upgrade it"):
            FullEngine(tiny_llama(layers=1), config=full_config(), adam=ADAM, device=CPU)


# ---- fp16's loss scale ----


class Scaled:
    """An engine whose first `overflows` steps find that the scaled gradient left float16's range.

    Stands in for DeepSpeed's fp16, which does not start on the CPU.
    """

    def __init__(self, engine, overflows, scale):
        self._engine, self._overflows, self.loss_scale = engine, overflows, scale
        self.module, self.trained, self.loss_scale_falls = engine.module, engine.trained, True
        self.backward, self.release, self.destroy = engine.backward, engine.release, engine.destroy

    def step(self, *, lr):
        if not self._overflows:
            return self._engine.step(lr=lr)
        self._overflows, self.loss_scale = self._overflows - 1, self.loss_scale / 2
        self._engine._engine.optimizer.zero_grad()
        self._engine._engine.optimizer.averaged_gradients = {}
        return None


def test_overflow_of_the_loss_scale_repeats_the_step(trainers):
    plain = trainers(model=dropping_llama())
    scaled = trainers(full_config(3), model=dropping_llama(), max_skipped_steps=1)
    scaled.backbone = Scaled(scaled.backbone, 3, 2.0**8)
    wanted, result = plain.train_step(), scaled.train_step()
    assert not result.void and result.loss == pytest.approx(wanted.loss, abs=1e-6)
    assert scaled.state.loss_scale == 2.0**5
    assert scaled.state.step == 1
    scaled.backbone._overflows, scaled.backbone.loss_scale = 9, 4.0
    assert scaled.train_step().void  # at the least scale it is no more the scale's fault
    assert scaled.state.loss_scale == 1.0


# ---- weights ----


@pytest.mark.parametrize("config", cases({**SETTINGS, "persistent": PERSISTENT}))
def test_full_state_dict_is_the_models(trainers, config):
    """Before any step: names, shapes, dtypes and bits of the unsharded model's; gathering disturbs nothing."""
    wanted = tiny_llama(layers=1).state_dict()
    trainer, other = trainers(config), trainers(config)
    got = trainer.backbone.full_state_dict()
    assert set(got) == set(wanted)
    assert all(equal_bits(got[name], wanted[name]) for name in wanted)
    before = {name: tensor.clone() for name, tensor in got.items()}
    for _ in range(3):
        assert trainer.train_step() == other.train_step()
        after = trainer.backbone.full_state_dict()
    assert all(equal_bits(got[name], before[name]) for name in wanted)  # copies
    last = other.backbone.full_state_dict()
    assert all(equal_bits(after[name], last[name]) for name in wanted)
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def with_buffer(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = tiny_llama(layers=1).config.to_dict() | {"tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.register_buffer("counts", torch.arange(3))
    return model


@each_stage
def test_tied_weights_are_one_and_buffers_are_kept_if_persistent(trainers, stage):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_buffer(tied=True)
    wanted = set(model.state_dict())
    trainer = trainers(full_config(stage), model=model)
    trainer.train_step()
    got = trainer.backbone.full_state_dict()
    assert set(got) == wanted and "counts" in got  # and no inv_freq
    assert got["lm_head.weight"].data_ptr() == got["model.embed_tokens.weight"].data_ptr()


@each_stage
@pytest.mark.parametrize("tied", [False, True])
def test_written_model_reloads_with_the_logits_of_training(trainers, tmp_path, stage, tied):
    base = save_tiny_llama(tmp_path / "base", layers=1)
    if tied:
        config = AutoModelForCausalLM.from_pretrained(base).config
        config.tie_word_embeddings = True
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    model.config.use_cache = False
    trainer = trainers(full_config(stage), model=model)
    for _ in range(3):
        trainer.train_step()
    module, weights = trainer.backbone.module.eval(), trainer.backbone.full_state_dict()
    ids = torch.arange(4, 36)[None]
    with torch.no_grad():
        logits = module(input_ids=ids, use_cache=False).logits
    trainer.backbone.release()
    write_model(tmp_path / "final", module, weights, AutoTokenizer.from_pretrained(base))
    assert not list((tmp_path / "final").glob("*.bin"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert again.config.use_cache and not module.config.use_cache
    assert again.config.tie_word_embeddings == tied
    with torch.no_grad():
        assert equal_bits(again.eval()(input_ids=ids, use_cache=False).logits, logits)
    assert not torch.equal(again.lm_head.weight, AutoModelForCausalLM.from_pretrained(base).lm_head.weight)
    words, own = AutoTokenizer.from_pretrained(tmp_path / "final"), AutoTokenizer.from_pretrained(base)
    assert words("a, b")["input_ids"] == own("a, b")["input_ids"] and len(own("a, b")["input_ids"]) == 4


# ---- checkpoints ----


CHECKPOINTS = {
    **SETTINGS,
    "stage 3, persistent": PERSISTENT,
    **{f"bf16 stage {stage}": full_config(stage, dtype=torch.bfloat16) for stage in (1, 2, 3)},
}


@pytest.mark.parametrize("config", cases(CHECKPOINTS))
def test_resumed_run_equals_the_unbroken_one_to_the_bit(trainers, tmp_path, config):
    dtype = torch.bfloat16 if "bf16" in config else torch.float32

    def make(seed=0):
        model = tiny_llama(seed, layers=1, dtype=dtype)
        return trainers(config, model=model, data=TokenBatches(num_grains=2), compute_dtype=dtype)

    unbroken, saved, resumed = make(), make(), make(seed=9)  # other weights
    wanted = [unbroken.train_step() for _ in range(6)]
    assert [saved.train_step() for _ in range(3)] == wanted[:3]
    saved.backbone.save(tmp_path, "step-3")
    assert not (tmp_path / "latest").exists()
    resumed.backbone.load(tmp_path, "step-3")
    resumed.state = LoopState(**asdict(saved.state))
    weights = unbroken.backbone.full_state_dict()
    for trainer in (saved, resumed):  # saving disturbs nothing
        assert [trainer.train_step() for _ in range(3)] == wanted[3:]
        other = trainer.backbone.full_state_dict()
        assert all(equal_bits(weights[name], other[name]) for name in weights)


ELSEWHERE = {
    "stage 1 to 2": (full_config(1), full_config(2)),
    "stage 1 to 3": (full_config(1), full_config(3)),
    "stage 2 to 3, persistent": (full_config(2), PERSISTENT),
    "stage 3 to 1": (full_config(3), full_config(1)),
    "stage 3, persistent to 2": (PERSISTENT, full_config(2)),
    "stage 3 to 3, small groups": (full_config(3), full_config(3, sub_group_size=5000)),
    "stage 3, small groups to 3": (full_config(3, sub_group_size=5000), full_config(3)),
    "stage 2 to 2 with offload": (full_config(2), full_config(2, offload=True)),
    "stage 2 to 3 with offload": (full_config(2), full_config(3, offload=True)),
    "stage 3 with offload to 1 with offload": (full_config(3, offload=True), full_config(1, offload=True)),
    "stage 3 with offload to 3": (full_config(3, offload=True), full_config(3)),
    "bf16 stage 1 to 3": (full_config(1, dtype=torch.bfloat16), full_config(3, dtype=torch.bfloat16)),
    "bf16 stage 2 to 1": (full_config(2, dtype=torch.bfloat16), full_config(1, dtype=torch.bfloat16)),
    "bf16 stage 3 to 2": (full_config(3, dtype=torch.bfloat16), full_config(2, dtype=torch.bfloat16)),
}


def whole_state(engine):
    """Masters and moments of every parameter [shape] and the optimizer's step counters."""
    out = {}
    if engine.stage < 3:
        engine._engine.optimizer._lazy_init_hp_params_optimizer_state()  # as its next step would
    for name, parameter in engine.module.named_parameters():
        out[name] = safe_get_full_fp32_param(parameter)
        out |= {f"{name} {m}": safe_get_full_optimizer_state(parameter, m) for m in ("exp_avg", "exp_avg_sq")}
    base = engine._engine.optimizer.optimizer
    return out, {int(entry["step"]) for entry in base.state.values()}


@pytest.mark.parametrize(("before", "after"), cases(ELSEWHERE))
def test_another_stage_or_offload_takes_over_every_bit(trainers, tmp_path, before, after):
    """Masters, moments, step counter, weights and buffers; the next steps are those of the run that was saved."""
    dtype = torch.bfloat16 if "bf16" in before else torch.float32

    def make(config, seed):
        model = tiny_llama(seed, layers=1, dtype=dtype)
        model.register_buffer("counts", torch.arange(3) + seed)
        return trainers(config, model=model, data=TokenBatches(num_grains=2), compute_dtype=dtype)

    saved, resumed = make(before, 0), make(after, 9)  # other weights
    for _ in range(3):
        saved.train_step()
    saved.backbone.save(tmp_path, "step-3")
    resumed.backbone.load(tmp_path, "step-3")
    resumed.state = LoopState(**asdict(saved.state))
    wanted, steps = whole_state(saved.backbone)
    got, own_steps = whole_state(resumed.backbone)
    assert own_steps == steps == {3}
    assert wanted.keys() == got.keys()
    assert all(equal_bits(wanted[name], got[name]) for name in wanted)
    weights, own = saved.backbone.full_state_dict(), resumed.backbone.full_state_dict()
    assert all(equal_bits(weights[name], own[name]) for name in weights)
    assert resumed.backbone._engine.global_steps == 3
    for _ in range(3):
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
        assert resumed.train_step().loss == pytest.approx(saved.train_step().loss, abs=tolerance)
    assert whole_state(resumed.backbone)[1] == {6}


@pytest.mark.full
def test_deepspeeds_own_kernel_goes_on_at_another_stage(trainers, tmp_path):
    """It counts steps in an integer, torch's in a tensor."""
    adam = AdamSettings(kernel="cpu_adam")
    saved = trainers(full_config(2, offload=True), adam=adam)
    resumed = trainers(full_config(3, offload=True), model=tiny_llama(9, layers=1), adam=adam)
    for _ in range(3):
        saved.train_step()
    saved.backbone.save(tmp_path, "step-3")
    resumed.backbone.load(tmp_path, "step-3")
    resumed.state = LoopState(**asdict(saved.state))
    (wanted, _), (got, steps) = whole_state(saved.backbone), whole_state(resumed.backbone)
    assert steps == {3} and all(equal_bits(wanted[name], got[name]) for name in wanted)
    for _ in range(3):
        assert resumed.train_step().loss == pytest.approx(saved.train_step().loss, abs=1e-6)


def test_before_the_first_step_there_are_no_moments_to_take_over(trainers, tmp_path):
    saved, resumed = trainers(full_config(2)), trainers(full_config(3), model=tiny_llama(9, layers=1))
    saved.backbone.save(tmp_path, "step-0")
    resumed.backbone.load(tmp_path, "step-0")
    for _ in range(4):
        assert resumed.train_step().loss == pytest.approx(saved.train_step().loss, abs=1e-6)
    assert whole_state(resumed.backbone)[1] == {4}


def test_checkpoint_that_cannot_be_taken_over_is_refused(trainers, tmp_path):
    engine = trainers(full_config(2)).backbone
    engine.save(tmp_path, "one")
    other = trainers(full_config(3), model=tiny_llama(layers=2)).backbone
    with pytest.raises(ValueError, match=r"one holds 0 numbers of model.layers.1.* resume with the model it was saved"):
        other.load(tmp_path, "one")
    layout = tmp_path / "one" / "layout.json"
    layout.write_text(layout.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ValueError, match=r"one is no complete .* \(0 files are named \*zero_pp_rank_1_"):
        engine.load(tmp_path, "one")
    layout.write_text('{"processes": 1, "stage": 3}')
    with pytest.raises(ValueError, match=r"one is no complete .* \(0 files are named zero_pp_rank_0_"):
        engine.load(tmp_path, "one")
    engine.resumable = False  # as with the optimizer on NVMe
    with pytest.raises(ValueError, match="offload_optimizer.device=nvme: DeepSpeed does not bring such an optimizer"):
        engine.load(tmp_path, "one")
    engine.resumable = True
    with pytest.raises(ValueError, match=r"two is no complete DeepSpeed checkpoint of this program \(layout.json is"):
        engine.load(tmp_path, "two")


# ---- the loop ----


@each_stage
def test_evaluation_between_steps_changes_nothing(trainers, stage):
    plain, watched = (trainers(full_config(stage), model=dropping_llama()) for _ in range(2))
    watched.eval_data = HeldOutBatches(seed=5, num_grains=3, length=17)
    for _ in range(4):
        first = watched.evaluate()
        assert watched.evaluate() == first  # no dropout
        assert plain.train_step() == watched.train_step()
        assert watched.backbone.module.training
    assert watched.evaluate().loss != first.loss
    assert watched.clock.seconds("evaluate") > 0.0


def test_fit_calls_its_hooks_and_stops_on_request(trainers):
    calls = []
    trainer = trainers(total_steps=7, eval_steps=3, save_steps=2, eval_on_start=True)
    trainer.eval_data = HeldOutBatches(num_grains=1)
    trainer.hooks = Hooks(
        on_step=lambda result: calls.append(result.step),
        on_evaluate=lambda step, held_out: calls.append(("evaluate", step)),
        save=lambda reason: calls.append((reason, trainer.state.step)),
        stop_flag=lambda: 5 if trainer.state.step == 4 else 0,
    )
    assert trainer.fit() == 5
    assert calls == [("evaluate", 0), 0, 1, ("step", 2), 2, ("evaluate", 3), 3, ("step", 4), 4, ("stop", 5)]
    trainer.hooks.stop_flag = lambda: 0
    assert trainer.fit() == 0
    assert calls[-6:] == [5, ("evaluate", 6), ("step", 6), 6, ("evaluate", 7), ("last", 7)]
    assert trainer.state.step == 7


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("after", [2, 4])
def test_stop_request_within_a_long_step_saves_the_state_before_it(trainers, tmp_path, stage, after):
    """After round 2 of 4, or between forward and backward of the last; the saved state goes on as if nothing was."""
    unbroken, trainer, resumed = (trainers(full_config(stage), stop_poll_seconds=1e-6) for _ in range(3))
    asked = []
    trainer.train_step()
    trainer.hooks = Hooks(
        save=lambda reason: trainer.backbone.save(tmp_path, f"{reason}-{trainer.state.step}"),
        stop_flag=lambda: asked.append(1) or (3 if len(asked) == after else 0),
    )
    assert trainer.fit() == 3
    assert len(asked) == after
    resumed.backbone.load(tmp_path, "stop-1")
    resumed.state = LoopState(**asdict(trainer.state))
    wanted = [unbroken.train_step() for _ in range(4)]
    assert [resumed.train_step() for _ in range(3)] == wanted[1:]


@each_stage
def test_digests_follow_the_weights_where_they_are_whole(trainers, stage):
    trainer, other = trainers(full_config(stage)), trainers(full_config(stage))
    first = trainer.digests()
    assert first == other.digests() and set(first) == ({"loop state"} if stage == 3 else {"loop state", "weights"})
    results = [t.train_step() for t in (trainer, other) for _ in range(2)]  # the first has a learning rate of 0
    assert results[:2] == results[2:]
    assert trainer.digests() == other.digests()
    assert all(first[name] != digest for name, digest in trainer.digests().items())
