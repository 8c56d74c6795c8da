"""The vision networks of the LAMB paper."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import Dropout, row_keys
from .flops import lenet_training_flops
from .losses import classification_loss

__all__ = ["LeNet", "classification_loss", "lenet_training_flops"]


class LeNet(nn.Module):
    """The LeNet of the LAMB paper's MNIST experiment (Table 7): two convolutions and two dense layers.

    5x5 convolution to 32 channels, ReLU, 2x2 max-pooling; the same to 64 channels; dense to 1,024, ReLU, dropout; dense
    to the classes. Convolutions keep the size ("same" padding). 3,274,634 parameters.

    Args:
        num_classes: outputs.
        dropout: probability between the dense layers; the default is the authors'.

    Example:
        >>> import torch
        >>> LeNet()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(7 * 7 * 64, 1024)
        self.dropout = Dropout(dropout)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, images: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """Return class logits [B, num_classes] of images [B, 1, 28, 28].

        Args:
            images: the images.
            dropout_keys: [B] int64, of which the dropout masks are functions; None takes them from torch's generator.
        """
        keys = None if dropout_keys is None else row_keys(dropout_keys, torch.zeros_like(dropout_keys))
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        return self.fc2(self.dropout(F.relu(self.fc1(features.flatten(1))), keys))
