"""In other people's trainers a pruned run is that of the plain loop, bit for bit."""

import copy
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import gradprune as gp

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
lightning = pytest.importorskip("lightning")

STEPS, BATCH = 8, 4
SCHEDULE = gp.Cubic(0.8, begin=0, end=6)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


class Net(nn.Module):
    """A perceptron that computes its own loss, as the models of transformers do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))  # of one scale as they begin

    def forward(self, x, labels):
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset):
    def __init__(self, rows):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 8, generator=generator)
        self.y = torch.randint(0, 3, (rows,), generator=generator)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, at):
        return {"x": self.x[at], "labels": self.y[at]}


def fresh():
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def loader(accumulate=1):
    return DataLoader(Rows(STEPS * BATCH * accumulate), batch_size=BATCH, shuffle=False)


def plain(*, accumulate=1, max_norm=None, **keywords):
    """The loop that every trainer must equal."""
    model, optimizer = fresh()
    pruner = gp.Pruner(model, optimizer, SCHEDULE, **keywords)
    batches = list(loader(accumulate))
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            (model(**batch)["loss"] / accumulate).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return model, pruner


def assert_same(model, pruner, expected):
    wanted_model, wanted = expected
    assert pruner.step == wanted.step == STEPS
    assert pruner.masks.sparsity == wanted.masks.sparsity > 0.79
    assert pruner.events == wanted.events
    for name, mask in wanted.masks.items():
        assert torch.equal(pruner.masks[name], mask), name
    for name, value in wanted_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert sum(int((~mask).sum()) for mask in pruner.masks.values()) == round(0.8 * 88)
    assert not any(model.state_dict()[name][~mask].any() for name, mask in pruner.masks.items())


# -------------------------------------------------------------------------------------------------- accelerate


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return accelerate.Accelerator(cpu=True)


@pytest.mark.parametrize("made", ["before prepare", "after prepare"])
def test_accelerate(accelerator, made):
    model, optimizer = fresh()
    if made == "before prepare":
        pruner = gp.Pruner(model, optimizer, SCHEDULE)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    if made == "after prepare":
        pruner = gp.Pruner(model, optimizer, SCHEDULE)
    for batch in data:
        optimizer.zero_grad()
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
    assert_same(model, pruner, plain())


def test_accelerate_accumulates_and_clips():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, data = accelerator.prepare(*fresh(), loader(2))
    pruner = gp.Pruner(model, optimizer, SCHEDULE)
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, pruner, plain(accumulate=2, max_norm=0.5))


def test_accelerate_skips_a_step_whose_gradients_overflow(accelerator):
    model, optimizer = fresh()
    optimizer = accelerate.optimizer.AcceleratedOptimizer(
        optimizer, device_placement=False, scaler=torch.amp.GradScaler("cpu", init_scale=4.0)
    )
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=2))
    for step, batch in enumerate(loader()):
        optimizer.zero_grad()
        optimizer.scaler.scale(model(**batch)["loss"]).backward()
        if step < 2:
            model.body[0].weight.grad[0, 0] = torch.inf
        optimizer.step()
        assert optimizer.step_was_skipped == (step < 2)
        assert pruner.step == max(0, step - 1)
    assert pruner.masks.sparsity == 0.5


def test_accelerate_saves_and_loads_a_registered_pruner(accelerator, tmp_path):
    model, optimizer, data = accelerator.prepare(*fresh(), loader())
    pruner = gp.Pruner(model, optimizer, SCHEDULE)
    accelerator.register_for_checkpointing(pruner)
    batches = list(data)

    def go_on(start, stop):
        for batch in batches[start:stop]:
            optimizer.zero_grad()
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()

    go_on(0, 4)
    accelerator.save_state(str(tmp_path / "state"))
    go_on(4, 6)
    accelerator.load_state(str(tmp_path / "state"))
    assert pruner.step == 4
    go_on(4, STEPS)
    assert_same(model, pruner, plain())


# ---------------------------------------------------------------------------------------------- transformers' Trainer


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Prune(transformers.TrainerCallback):
    """Makes the pruner when training begins, saves and loads it beside the checkpoints."""

    def __init__(self):
        self.pruner = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        self.pruner = gp.Pruner(model, optimizer, SCHEDULE, within={})
        file = os.path.join(args.output_dir, f"checkpoint-{state.global_step}", "pruner.pt")
        if os.path.exists(file):
            self.pruner.load_state_dict(torch.load(file, weights_only=True))

    def on_save(self, args, state, control, **_):
        file = os.path.join(args.output_dir, f"checkpoint-{state.global_step}", "pruner.pt")
        torch.save(self.pruner.state_dict(), file)


def trainer(tmp_path, model, *, optimizer=None, callbacks=(), **arguments):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        **{
            "per_device_train_batch_size": BATCH,
            "max_steps": STEPS,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
        }
        | arguments,
    )
    accumulate = arguments.gradient_accumulation_steps
    return InOrder(
        model,
        arguments,
        train_dataset=Rows(STEPS * BATCH * accumulate),
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def test_transformers_with_the_optimizer_given(tmp_path):
    model, optimizer = fresh()
    pruner = gp.Pruner(model, optimizer, SCHEDULE)
    trainer(tmp_path, model, optimizer=optimizer).train()
    assert_same(model, pruner, plain())


def test_transformers_with_a_callback(tmp_path):
    model, optimizer = fresh()
    callback = Prune()
    trainer(tmp_path, model, optimizer=optimizer, callbacks=[callback]).train()
    assert_same(model, callback.pruner, plain())


def test_transformers_accumulates_and_clips(tmp_path):
    model, optimizer = fresh()
    callback = Prune()
    run = trainer(
        tmp_path, model, optimizer=optimizer, callbacks=[callback], gradient_accumulation_steps=2, max_grad_norm=0.5
    )
    run.model_accepts_loss_kwargs = False
    run.train()
    assert_same(model, callback.pruner, plain(accumulate=2, max_norm=0.5))


def test_transformers_resumes_from_a_checkpoint(tmp_path):
    model, optimizer = fresh()
    trainer(tmp_path, model, optimizer=optimizer, callbacks=[Prune()], save_strategy="steps", save_steps=4).train()
    model, optimizer = fresh()
    callback = Prune()
    trainer(tmp_path, model, optimizer=optimizer, callbacks=[callback]).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert_same(model, callback.pruner, plain())


# ----------------------------------------------------------------------------------------------------------- Lightning


class Module(lightning.LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        self.net, self.made = fresh()
        self.automatic_optimization = not manual
        self.pruner = None

    def configure_optimizers(self):
        return self.made

    def training_step(self, batch, _):
        loss = self.net(**batch)["loss"]
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_train_start(self):
        # As a callback would: with the optimizer that Lightning wraps.
        self.pruner = gp.Pruner(self.net, self.optimizers(), SCHEDULE, within={})
        if self.waiting is not None:
            self.pruner.load_state_dict(self.waiting)

    waiting = None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["pruner"] = self.pruner.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.waiting = checkpoint["pruner"]


def lightning_trainer(tmp_path, steps=STEPS, **keywords):
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"enable_checkpointing": False} | keywords,
    )


@pytest.mark.parametrize("manual", [False, True])
def test_lightning(tmp_path, manual):
    module = Module(manual)
    lightning_trainer(tmp_path).fit(module, loader())
    assert_same(module.net, module.pruner, plain())


def test_lightning_accumulates_and_clips(tmp_path):
    module = Module()
    keywords = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    lightning_trainer(tmp_path, **keywords).fit(module, loader(2))
    assert_same(module.net, module.pruner, plain(accumulate=2, max_norm=0.5))


def test_lightning_regrows_as_the_plain_loop_does(tmp_path):
    class Regrowing(Module):
        def on_train_start(self):
            self.pruner = gp.Pruner(self.net, self.optimizers(), SCHEDULE, regrow=gp.Regrow(gp.gradient, every=2))

    module = Regrowing()
    lightning_trainer(tmp_path).fit(module, loader())
    assert_same(module.net, module.pruner, plain(regrow=gp.Regrow(gp.gradient, every=2)))


def test_lightning_resumes_from_a_checkpoint(tmp_path):
    epoch = DataLoader(Rows(BATCH), batch_size=BATCH)  # one batch: resumed, Lightning takes the first of an epoch twice
    every_epoch = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = Module()
    lightning_trainer(tmp_path, callbacks=[every_epoch], enable_checkpointing=True).fit(whole, epoch)
    resumed = Module()
    lightning_trainer(tmp_path).fit(resumed, epoch, ckpt_path=str(tmp_path / "epoch=3.ckpt"), weights_only=True)
    assert_same(resumed.net, resumed.pruner, (whole.net, whole.pruner))


# ------------------------------------------------------------------------------------ what writes outside of steps


def test_an_average_is_dense_until_its_masks_are_applied():
    model, pruner = plain()
    average = torch.optim.swa_utils.AveragedModel(fresh()[0])
    average.update_parameters(copy.deepcopy(model))
    average.update_parameters(fresh()[0])
    assert pruner.masks.holds(model)
    assert not pruner.masks.holds(average)
    gp.Masks(dict(pruner.masks)).apply_(average)
    assert pruner.masks.holds(average)
    assert pruner.masks.holds(model)


def test_gan_with_two_models_and_two_optimizers_is_two_pruners():
    torch.manual_seed(0)
    pair = nn.Linear(4, 8), nn.Linear(8, 4)
    optimizers = [torch.optim.Adam(net.parameters(), 0.01) for net in pair]
    pruners = [gp.Pruner(net, o, gp.OneShot(0.5, at=2)) for net, o in zip(pair, optimizers, strict=True)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
            pair[1](pair[0](torch.randn(8, 4))).square().mean().backward()
            optimizer.step()
    assert [pruner.masks.sparsity for pruner in pruners] == [0.5, 0.5]
    assert [int((net.weight == 0).sum()) for net in pair] == [16, 16]


def test_no_trainer_of_ours_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain()
