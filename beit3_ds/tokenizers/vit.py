"""Defines the Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) of the visual tokenizer.

The tokenizer's encoder and decoder are instances of `VisionTransformer`. Parameters are named as in timm and in the
released VQ-KD files.
"""

# B images, S pixels on a side, N patches, L = N + 1 tokens with the class token, D hidden, H heads, K head
# dim.

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_LAYER_NORM_EPSILON = 1e-6  # BEiT v2's value


class Float32Linear(nn.Linear):
    """Linear layer that computes in float32, regardless of the dtypes of input and parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x @ weight.T + bias in float32."""
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class PatchEmbed(nn.Module):
    """Divides images, (images, channels, size, size), into patches, and projects them to (images, patches, width)."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """Returns the projected patches in row-major order, (images, patches, width)."""
        patches: Tensor = self.proj(image.to(self.proj.weight.dtype))
        return patches.flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of each image, (images, tokens, width)."""

    def __init__(self, hidden_size: int, num_attention_heads: int) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Returns the attention output for tokens, (images, tokens, width); tokens of an image attend to each other."""
        qkv_BLHK = self.qkv(x_BLD).unflatten(-1, (3, self.num_attention_heads, -1))
        query, key, value = qkv_BLHK.permute(2, 0, 3, 1, 4)
        mixed_BHLK = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed_BHLK.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them; the hidden layer has 4 times the width.

    Input and output are (images, tokens, width).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Applies the layers to each token, (images, tokens, width)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BLD)))
        return out


class TransformerBlock(nn.Module):
    """Transformer block with pre-norm attention and MLP, each with a residual connection.

    Input and output are (images, tokens, width).
    """

    def __init__(self, hidden_size: int, num_attention_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=_LAYER_NORM_EPSILON)
        self.attn = SelfAttention(hidden_size, num_attention_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=_LAYER_NORM_EPSILON)
        self.mlp = Mlp(hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Adds the attention output and then the MLP output to the tokens, (images, tokens, width)."""
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        return x_BLD + self.mlp(self.norm2(x_BLD))


class VisionTransformer(nn.Module):
    """Vision Transformer with a class token and absolute position embeddings.

    Maps (images, channels, size, size) to (images, patches, width).

    Args:
        in_channels: channels of the input: 3 if the input is an image, or the width of a code if it is a grid of codes.
        grid_size: number of patches along one side.
        patch_size: pixels (or codes) along one side of a patch.
        hidden_size: width of a token.
        num_layers: number of Transformer blocks.
        num_attention_heads: number of attention heads; must divide `hidden_size`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        grid_size: int,
        patch_size: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
    ) -> None:
        super().__init__()
        self.recompute_blocks = False
        """Whether the backward pass recomputes the activations of whole blocks."""
        self.patch_embed = PatchEmbed(in_channels, hidden_size, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid_size**2, hidden_size))
        self.blocks = nn.ModuleList(TransformerBlock(hidden_size, num_attention_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, eps=_LAYER_NORM_EPSILON)
        self._initialize()

    def forward(self, image: Tensor) -> Tensor:
        """Returns the normalized patch tokens of the last layer in row-major order, without the class token."""
        patches_BND = self.patch_embed(image)
        class_token = self.cls_token.expand(patches_BND.shape[0], -1, -1)
        x_BLD = torch.cat([class_token, patches_BND], dim=1) + self.pos_embed
        for block in self.blocks:
            if self.recompute_blocks and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BLD = block(x_BLD)
        normalized: Tensor = self.norm(x_BLD)
        return normalized[:, 1:]

    @torch.no_grad()
    def _initialize(self) -> None:
        """Initialises all parameters; divides the output weights of the residual branches in layer l by sqrt(2 l), as
        BEiT does.
        """
        initialize_linear_layers(self)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
        for layer, block in enumerate(self.blocks, start=1):
            assert isinstance(block, TransformerBlock)
            block.attn.proj.weight.div_((2 * layer) ** 0.5)
            block.mlp.fc2.weight.div_((2 * layer) ** 0.5)


def initialize_linear_layers(module: nn.Module) -> None:
    """Initialises all linear layers and convolutions in `module` with Xavier uniform weights and zero biases.

    BEiT's fixed standard deviation of 0.02 suits a width of 768, but is too small for a small tokenizer.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(child.weight.flatten(1))
            assert child.bias is not None
            nn.init.zeros_(child.bias)
