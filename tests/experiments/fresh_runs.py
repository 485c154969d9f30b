"""Runs that nobody trained, where no good model is needed."""

import dataclasses

import jax

from experiments.checkpoints import Checkpoints
from experiments.data import DataConfig
from experiments.runs import RunConfig, create_run
from mesanet_jax import MesaNet, MesaNetConfig
from mesanet_jax.train import init_train_state, make_optimizer

MODEL = MesaNetConfig(vocab_size=300, num_layers=1, model_dim=16, num_heads=2, key_dim=8, value_dim=8, max_context=16)


def fresh_run(folder, corpus, pattern, tokenizer=""):
    """A run whose checkpoint holds initial parameters: nothing here needs a good model."""
    data = DataConfig(source=(str(corpus),), held_out=0.4, length=16, batch_size=2, tokenizer=tokenizer)
    config = RunConfig(output=folder, model=dataclasses.replace(MODEL, pattern=(pattern,)), data=data)
    create_run(config, text=0)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, init_train_state(jax.random.key(0), MesaNet(config.model), optimizer))
    return folder
