"""The methods. One file each; a method is added by its file and one import line here."""

from onlinesel.strategies.grad_norm import GradNorm
from onlinesel.strategies.info_batch import InfoBatch
from onlinesel.strategies.loss_reweight import LossReweight
from onlinesel.strategies.rho_loss import RHOLoss
from onlinesel.strategies.rs2 import RS2
from onlinesel.strategies.selective_backprop import SelectiveBackprop
from onlinesel.strategies.top_loss import TopLoss
from onlinesel.strategies.uds import UDS
from onlinesel.strategies.uniform import Uniform

__all__ = [
    "GradNorm",
    "InfoBatch",
    "LossReweight",
    "RHOLoss",
    "RS2",
    "SelectiveBackprop",
    "TopLoss",
    "UDS",
    "Uniform",
]
