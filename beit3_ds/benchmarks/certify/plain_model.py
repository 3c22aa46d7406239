"""Implements BEiT-3 in plain PyTorch with padding and torch.compile, as a baseline for training steps.

The layers match the released models: every block has an image expert, a text expert and sub-LN.
"""

# B samples of one kind, S rows of a padded sample, N rows of an image, D hidden, H heads, K head width.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.benchmarks.step.reference import PaddedStream
from beit3_ds.config import ModelConfig


class Experts(nn.Module):
    """Contains two copies of a layer: one for image rows, and one for text rows."""

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.image, self.text = image, text

    def forward(self, x_BSD: Tensor, num_image_rows: int) -> Tensor:
        """Applies each copy of the layer to its own rows, and returns all rows in the order of the input.

        Args:
            x_BSD: input rows of B samples. In each sample, image rows come first.
            num_image_rows: number of image rows per sample; 0 for texts.
        """
        if num_image_rows == 0:
            y: Tensor = self.text(x_BSD)
        elif num_image_rows == x_BSD.shape[1]:
            y = self.image(x_BSD)
        else:
            y = torch.cat([self.image(x_BSD[:, :num_image_rows]), self.text(x_BSD[:, num_image_rows:])], 1)
        return y


class PlainBlock(nn.Module):
    """Computes attention and FFN with stochastic depth. Each of the two has a norm before it and a sub-LN inside."""

    def __init__(self, config: ModelConfig, drop_path_rate: float) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.heads, self.drop_path_rate = config.num_attention_heads, drop_path_rate

        def norm(size: int) -> Experts:
            return Experts(nn.LayerNorm(size), nn.LayerNorm(size))

        def linear(inputs: int, outputs: int) -> Experts:
            return Experts(nn.Linear(inputs, outputs), nn.Linear(inputs, outputs))

        self.norm1, self.qkv, self.norm2, self.out = (
            norm(width),
            linear(width, 3 * width),
            norm(width),
            linear(width, width),
        )
        self.norm3, self.fc1, self.norm4, self.fc2 = (
            norm(width),
            linear(width, inner),
            norm(inner),
            linear(inner, width),
        )

    def forward(self, x_BSD: Tensor, num_image_rows: int, mask: Tensor | None) -> Tensor:
        """Returns the block's output rows.

        Args:
            x_BSD: input rows of B samples. In each sample, image rows come first.
            num_image_rows: number of image rows per sample; 0 for texts.
            mask: attention mask (B, 1, 1, S), bool, False at padding; None without padding.
        """
        batch, rows, width = x_BSD.shape
        qkv = self.qkv(self.norm1(x_BSD, num_image_rows), num_image_rows)
        q, k, v = qkv.view(batch, rows, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, rows, width)
        x_BSD = x_BSD + self._drop(self.out(self.norm2(y, num_image_rows), num_image_rows))
        a = F.gelu(self.fc1(self.norm3(x_BSD, num_image_rows), num_image_rows))
        return x_BSD + self._drop(self.fc2(self.norm4(a, num_image_rows), num_image_rows))

    def _drop(self, branch: Tensor) -> Tensor:
        if self.drop_path_rate == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path_rate
        return branch * (keep / (1 - self.drop_path_rate)).to(branch.dtype)


class PlainModel(nn.Module):
    """Contains embeddings, blocks and the two heads of masked modeling."""

    def __init__(self, config: ModelConfig, compiles: bool) -> None:
        """Builds the layers of the model.

        Args:
            config: sizes of the model.
            compiles: whether to compile the blocks with torch.compile.
        """
        super().__init__()
        width = config.hidden_size
        self.patches = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.image_positions = nn.Parameter(torch.zeros(1 + config.num_patches, width))
        self.words, self.text_positions = nn.Embedding(config.text_vocab_size, width), nn.Embedding(1024, width)
        rates = torch.linspace(0, config.drop_path_rate, config.num_layers).tolist()
        self.blocks = nn.ModuleList(PlainBlock(config, rate) for rate in rates)
        if compiles:
            for block in self.blocks:
                block.compile(dynamic=False)
        self.norm = Experts(nn.LayerNorm(width), nn.LayerNorm(width))
        self.mim_head, self.mlm_head = (
            nn.Linear(width, size) for size in (config.visual_vocab_size, config.text_vocab_size)
        )

    def forward(self, stream: PaddedStream) -> list[Tensor]:
        """Returns two losses: the mean cross entropy of masked patches, and the mean cross entropy of masked tokens.

        A batch without images or without texts gives only one of these losses.
        """
        parts, visible, num_image_rows = [], [], 0
        if stream.pixels is not None and stream.patch_mask is not None:
            x = self.patches(stream.pixels.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
            x = torch.where(stream.patch_mask[..., None], self.mask_token.to(x.dtype), x)
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.image_positions.to(x.dtype)
            num_image_rows = x.shape[1]
            parts.append(x)
            visible.append(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        if stream.tokens is not None and stream.padding is not None:
            positions = torch.arange(stream.tokens.shape[1], device=stream.tokens.device)
            text = self.words(stream.tokens) + self.text_positions(positions)
            parts.append(text.to(parts[0].dtype) if parts else text)
            visible.append(~stream.padding)
        x = torch.cat(parts, 1)
        mask = None if stream.padding is None else torch.cat(visible, 1)[:, None, None, :]
        for block in self.blocks:
            x = block(x, num_image_rows, mask)
        y_BSD = self.norm(x, num_image_rows)
        losses = []
        if stream.patch_mask is not None and stream.codes is not None:
            rows = y_BSD[:, 1:num_image_rows][stream.patch_mask]
            losses.append(F.cross_entropy(self.mim_head(rows).float(), stream.codes))
        if stream.token_mask is not None and stream.targets is not None:
            rows = y_BSD[:, num_image_rows:][stream.token_mask]
            losses.append(F.cross_entropy(self.mlm_head(rows).float(), stream.targets))
        return losses
