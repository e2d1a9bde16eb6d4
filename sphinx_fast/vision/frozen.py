"""The encoders as plain arithmetic (`layers`) over weights that do not train: fewer passes, no copies, same numbers.

Each `*_into` reads its module's weights (`prepare`), runs, and lets its last LayerNorm write into `out`, a slice of a
buffer that all encoders share. It raises NotPlainError before any work where the modules hold something unknown.

Shapes: N views, P patch positions, C channels, H heads, d head width. Activations are updated in place: they are ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, Dinov2Model

from sphinx_fast.vision.convnext import ConvNextModel
from sphinx_fast.vision.layers import (
    Activation,
    Linear,
    Norm,
    attend,
    feed_forward,
    feed_forward_,
    layer_norm,
    layer_norm_into,
    project,
    residual_,
)
from sphinx_fast.vision.prepare import NotPlainError, activation, beside, child, linear, norm, plain
from sphinx_fast.vision.qformer import QFormerEncoder

# Probabilities of things that happen to modules in training only.
CHANCES = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate")


class Patches(NamedTuple):
    """A ViT's first layer: a strided convolution, a class token, a position table [1 + P, C]."""

    weight: Tensor
    bias: Tensor | None
    class_token: Tensor
    positions: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, s, s] -> [N, 1 + P, C]."""
        patches = F.conv2d(pixels, self.weight, self.bias, stride=self.weight.shape[-2:]).flatten(2).transpose(1, 2)
        count, positions, channels = patches.shape
        if positions + 1 != self.positions.shape[0]:
            raise NotPlainError(f"a position table for {self.positions.shape[0]} tokens, and {positions + 1} of them")
        x = patches.new_empty(count, positions + 1, channels)
        x[:, 0] = self.class_token.reshape(-1) + self.positions[0]
        x[:, 1:] = patches + self.positions[1:]
        return x


class Block(NamedTuple):
    """A layer of a ViT, norms first. `up` is one layer and `act`, or gate and value of a SwiGLU (`act` None)."""

    norm1: Norm
    qkv: tuple[Linear, ...]
    out: Linear
    scale1: Tensor | None
    norm2: Norm
    up: tuple[Linear, ...]
    act: Activation | None
    down: Linear
    scale2: Tensor | None
    heads: int


def vit_block(x: Tensor, w: Block, implementation: str) -> Tensor:
    """x [N, T, C] -> x + scale1 * attention(norm1(x)), then + scale2 * feed_forward(norm2(.)), in place."""
    y = attend(project(layer_norm(x, w.norm1), w.qkv, 3), w.heads, implementation)
    residual_(x, F.linear(y, *w.out), w.scale1)
    return feed_forward_(x, layer_norm(x, w.norm2), w.up, w.act, w.down, w.scale2)


def ready(model: Any) -> str:
    """The attention that a transformers model asks for, if it is one of ours and no dropout would strike."""
    plain(model)
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "flash_attention_2"):
        raise NotPlainError(f"attention {implementation}")
    if model.training and any(getattr(model.config, name, 0) for name in CHANCES):
        raise NotPlainError("dropout in training")
    return implementation


def clip_block(layer: nn.Module) -> Block:
    """A layer of CLIP, and of BLIP-2's vision tower, which has q, k and v in one matrix already."""
    attention, mlp = child(plain(layer), "self_attn"), child(layer, "mlp")
    if hasattr(attention, "qkv"):
        qkv: tuple[Linear, ...] = (linear(attention, "qkv"),)
    else:
        qkv = beside(*(linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")))
    return Block(
        norm1=norm(layer, "layer_norm1"),
        qkv=qkv,
        out=linear(attention, "out_proj", "projection"),
        scale1=None,
        norm2=norm(layer, "layer_norm2"),
        up=(linear(mlp, "fc1"),),
        act=activation(mlp, "activation_fn"),
        down=linear(mlp, "fc2"),
        scale2=None,
        heads=attention.num_heads,
    )


def dinov2_block(layer: nn.Module) -> Block:
    """A layer of DINOv2. transformers < 5.20 nests the attention twice and packs the gate beside the value itself."""
    attention, mlp = child(plain(layer), "attention"), child(layer, "mlp")
    inner = child(attention, "attention") if hasattr(attention, "attention") else attention
    outer = child(attention, "output") if hasattr(attention, "output") else attention
    act = None
    if hasattr(mlp, "fc1"):
        up: tuple[Linear, ...] = (linear(mlp, "fc1"),)
        act = activation(mlp, "activation_fn", "activation")
    elif hasattr(mlp, "weights_in"):
        weight, bias = linear(mlp, "weights_in")
        biases = (None, None) if bias is None else bias.chunk(2)
        up = tuple(Linear(*half) for half in zip(weight.chunk(2), biases, strict=True))
    else:
        up = (linear(mlp, "gate_proj"), linear(mlp, "up_proj"))
    return Block(
        norm1=norm(layer, "norm1"),
        qkv=beside(*(linear(inner, *names) for names in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")))),
        out=linear(outer, "o_proj", "dense"),
        scale1=child(layer, "layer_scale1").lambda1,
        norm2=norm(layer, "norm2"),
        up=up,
        act=act,
        down=linear(mlp, "fc2", "down_proj", "weights_out"),
        scale2=child(layer, "layer_scale2").lambda1,
        heads=inner.num_attention_heads,
    )


def clip_into(model: CLIPVisionModel, pixels: Tensor, out: Tensor) -> None:
    """`clip_features` into `out` [N, 1 + P, C]."""
    implementation = ready(model)
    trunk = child(model, "vision_model") if hasattr(model, "vision_model") else model
    embeddings, encoder = child(trunk, "embeddings"), child(trunk, "encoder")
    patch = child(embeddings, "patch_embedding")
    first = Patches(
        patch.weight, patch.bias, embeddings.class_embedding, child(embeddings, "position_embedding").weight
    )
    pre, post = norm(trunk, "pre_layrnorm"), norm(trunk, "post_layernorm")
    blocks = [clip_block(layer) for layer in encoder.layers]
    x = layer_norm(first(pixels), pre)
    for block in blocks:
        x = vit_block(x, block, implementation)
    layer_norm_into(x, post, out)


def dinov2_into(model: Dinov2Model, pixels: Tensor, out: Tensor) -> None:
    """`dinov2_features` into `out` [N, 1 + P, C]."""
    implementation = ready(model)
    embeddings, encoder = child(model, "embeddings"), child(model, "encoder")
    patch = child(child(embeddings, "patch_embeddings"), "projection")
    first = Patches(patch.weight, patch.bias, embeddings.cls_token, embeddings.position_embeddings[0])
    post, blocks = norm(model, "layernorm"), [dinov2_block(layer) for layer in encoder.layer]
    x = first(pixels)
    for block in blocks:
        x = vit_block(x, block, implementation)
    layer_norm_into(x, post, out)


class QueryLayer(NamedTuple):
    """A layer of the Q-Former, norms last: attention over the queries, in some over the patches too, feed-forward."""

    qkv: tuple[Linear, ...]
    out: Linear
    norm1: Norm
    query: Linear | None
    key_value: tuple[Linear, ...]
    cross_out: Linear | None
    cross_norm: Norm | None
    up: Linear
    act: Activation
    down: Linear
    norm2: Norm
    heads: int


def query_layer(layer: Any) -> QueryLayer:
    """The weights of a Blip2QFormerLayer."""
    attention, up, down = (
        child(plain(layer), "attention"),
        child(layer, "intermediate_query"),
        child(layer, "output_query"),
    )
    own, after = child(attention, "attention"), child(attention, "output")
    query = cross_out = cross_norm = None
    key_value: tuple[Linear, ...] = ()
    if layer.has_cross_attention:
        cross = child(layer, "crossattention")
        other, behind = child(cross, "attention"), child(cross, "output")
        query, key_value = linear(other, "query"), beside(linear(other, "key"), linear(other, "value"))
        cross_out, cross_norm = linear(behind, "dense"), norm(behind, "LayerNorm")
    return QueryLayer(
        qkv=beside(*(linear(own, name) for name in ("query", "key", "value"))),
        out=linear(after, "dense"),
        norm1=norm(after, "LayerNorm"),
        query=query,
        key_value=key_value,
        cross_out=cross_out,
        cross_norm=cross_norm,
        up=linear(up, "dense"),
        act=activation(up, "intermediate_act_fn"),
        down=linear(down, "dense"),
        norm2=norm(down, "LayerNorm"),
        heads=own.num_attention_heads,
    )


def query_attention(x: Tensor, w: QueryLayer, patches: Tensor, implementation: str) -> Tensor:
    """Queries [N, Q, C] after both attentions of a layer, each added and normed."""
    y = attend(project(x, w.qkv, 3), w.heads, implementation)
    x = layer_norm(F.linear(y, *w.out).add_(x), w.norm1)
    if w.query is None or w.cross_out is None or w.cross_norm is None:
        return x
    y = attend([F.linear(x, *w.query), *project(patches, w.key_value, 2)], w.heads, implementation)
    return layer_norm(F.linear(y, *w.cross_out).add_(x), w.cross_norm)


def qformer_into(model: QFormerEncoder, pixels: Tensor, out: Tensor) -> None:
    """`QFormerEncoder.forward` into `out` [N, Q, C]."""
    vision, former = child(plain(model), "vision_model"), child(model, "qformer")
    seeing, asking = ready(vision), ready(former)
    embeddings, encoder = child(vision, "embeddings"), child(vision, "encoder")
    patch = child(embeddings, "patch_embedding")
    first = Patches(patch.weight, patch.bias, embeddings.class_embedding, embeddings.position_embedding[0])
    post, blocks = norm(vision, "post_layernorm"), [clip_block(layer) for layer in encoder.layers]
    start, layers = norm(former, "layernorm"), [query_layer(layer) for layer in child(former, "encoder").layer]
    x = first(pixels)
    for block in blocks:
        x = vit_block(x, block, seeing)
    patches = layer_norm(x, post)
    queries = layer_norm(model.query_tokens, start).expand(len(pixels), -1, -1)
    for layer in layers[:-1]:
        y = query_attention(queries, layer, patches, asking)
        queries = layer_norm(feed_forward(y, (layer.up,), layer.act, layer.down).add_(y), layer.norm2)
    last = layers[-1]
    y = query_attention(queries, last, patches, asking)
    layer_norm_into(feed_forward(y, (last.up,), last.act, last.down).add_(y), last.norm2, out)


class ConvBlock(NamedTuple):
    """A layer of ConvNeXt: x + gamma * down(act(up(norm(conv(x)))))."""

    conv: Any
    norm: Norm
    up: Linear
    act: Activation
    down: Linear
    gamma: Tensor


class ConvStage(NamedTuple):
    """What halves the map (absent in the first stage), and the layers."""

    norm: Norm | None
    conv: Any
    blocks: list[ConvBlock]


def conv_stage(stage: Any) -> ConvStage:
    """The weights of a `Stage`."""
    blocks = []
    for block in plain(stage).blocks:
        mlp, conv = child(plain(block), "mlp"), child(block, "conv_dw")
        up, down = linear(mlp, "fc1"), linear(mlp, "fc2")
        blocks.append(ConvBlock(conv, norm(block, "norm"), up, activation(mlp, "act"), down, block.gamma))
    if isinstance(plain(stage.downsample), nn.Identity):
        return ConvStage(None, None, blocks)
    return ConvStage(norm(stage.downsample, "0"), child(stage.downsample, "1"), blocks)


def conv_last(x: Tensor, conv: Any) -> Tensor:
    """A convolution of a map [N, h, w, C] that lies channels last, and stays so: the permutations move nothing."""
    y = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
    return y.permute(0, 2, 3, 1)


def conv_block(x: Tensor, w: ConvBlock) -> Tensor:
    """x [N, h, w, C] -> x + gamma * feed_forward(norm(conv(x))), in place."""
    y = layer_norm(conv_last(x, w.conv), w.norm)
    return feed_forward_(x, y, (w.up,), w.act, w.down, w.gamma)


def convnext_into(model: ConvNextModel, pixels: Tensor, out: Tensor) -> None:
    """`convnext_features` into `out` [N, 1 + p, C], p the positions of ConvNeXt's own map."""
    stem, head = child(plain(model), "stem"), child(model, "head")
    first, after, last = child(stem, "0"), norm(stem, "1"), norm(head, "norm")
    stages = [conv_stage(stage) for stage in child(model, "stages")]
    x = pixels.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    x = layer_norm(conv_last(x, first), after)
    for stage in stages:
        if stage.norm is not None:
            x = conv_last(layer_norm(x, stage.norm), stage.conv)
        for block in stage.blocks:
            x = conv_block(x, block)
    layer_norm_into(x.flatten(1, 2), last, out[:, 1:])
    out[:, 0] = out[:, 1:].mean(dim=1)
