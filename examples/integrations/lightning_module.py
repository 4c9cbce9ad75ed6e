"""Lightning: manual optimization, since one optimizer step is two backward passes.

pip install pytorch-lightning
"""

import pytorch_lightning
import torch

from hf_ssam import TwoPass


class SharpnessAware(pytorch_lightning.LightningModule):
    """Trains any Transformers model whose output has a `loss`."""

    def __init__(self, model, method="ssam", rho=0.05, lr=1e-3):
        super().__init__()
        self.model, self.lr = model, lr
        self.chosen = {"method": method, "rho": rho}
        self.kept = None  # the engine's state in a checkpoint
        self.automatic_optimization = False  # Lightning's own loop would step after the first backward

    def on_fit_start(self):
        self.two_pass = TwoPass(self.model, **self.chosen)  # on the device, after the strategy has set it up

    def training_step(self, batch, _):
        def forward_backward():
            loss = self.model(**batch).loss
            self.manual_backward(loss)
            return loss

        optimizer = self.optimizers()
        optimizer.zero_grad()
        report = self.two_pass.step(forward_backward)
        optimizer.step()
        self.log_dict({"loss": report.loss, "ascent_loss": report.ascent_loss, "scale": report.scale})

    def on_save_checkpoint(self, checkpoint):
        checkpoint["two_pass"] = self.two_pass.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.kept = checkpoint["two_pass"]

    def on_train_start(self):
        if self.kept is not None:
            self.two_pass.load_state_dict(self.kept)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)
