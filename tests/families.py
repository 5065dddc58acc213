"""Text-to-image pipelines of today's families: diffusers' own classes at tiny random configurations, saved as folders.

Widths are a few channels, images 32 to 64 px; VAE strides are 2 or 4 where the published models have 8 or 32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    KandinskyV22CombinedPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PriorTransformer,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.parity import tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLIP_WIDTH = T5_WIDTH = 32
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def clip(projected: bool = False, width: int = CLIP_WIDTH) -> Any:
    sizes = {"intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tiny.text_config(hidden_size=width, projection_dim=width, **sizes)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tiny.TOKENIZER)


def t5() -> T5EncoderModel:
    sizes = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return T5EncoderModel(T5Config(**sizes)).eval()


def t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -3.0) for letter in LETTERS)], extra_ids=0, model_max_length=64)


def kl(channels: int = 4, **options: Any) -> AutoencoderKL:
    """A VAE of stride 2."""
    return tiny.vae((8, 16), **{"latent_channels": channels, "sample_size": 32, "scaling_factor": 0.18215} | options)


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=tiny.unet(
            sample_size=16,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
            cross_attention_dim=2 * CLIP_WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(**NOISE, steps_offset=1, timestep_spacing="leading"),
        vae=kl(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projected=True),
        tokenizer_2=clip_tokenizer(),
    )


def sd3() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=2 * CLIP_WIDTH // 2,
            out_channels=4,
            pos_embed_max_size=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projected=True, width=16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projected=True, width=16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def flux(told: bool = True) -> FluxPipeline:
    """FLUX.1 dev, or schnell, which is not told its guidance."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=told,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=told),
        vae=kl(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def pixart() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=T5_WIDTH,
            cross_attention_dim=24,
            use_additional_conditions=False,
        ),
        scheduler=DDIMScheduler(),
        vae=kl(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def sana() -> SanaPipeline:
    """Its VAE has stride 4, its transformer no patches."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1}
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_qkv_multiscales=((), (5,), (5,)),
            decoder_qkv_multiscales=((), (5,), (5,)),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=[1, 1, 1],
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(Gemma2Config(hidden_size=8, intermediate_size=8, vocab_size=64, **sizes)),
        tokenizer=GemmaTokenizer(
            vocab={token: i for i, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS))},
            merges=[],
            model_max_length=64,
        ),
    )


def qwen() -> QwenImagePipeline:
    from tokenizers.pre_tokenizers import ByteLevel

    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {token: i for i, token in enumerate((*marks, *sorted(ByteLevel.alphabet())))}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
            "vocab_size": 300,
        },
        vision_config=vision,
    )
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=4 * 6,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=list(marks[1:])),
    )


def kandinsky() -> KandinskyV22CombinedPipeline:
    vision = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        image_size=32,
        projection_dim=CLIP_WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        patch_size=14,
    )
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        embedding_dim=CLIP_WIDTH,
        num_layers=1,
        num_embeddings=tiny.CONTEXT,
    )
    prior.clip_std.data.fill_(1)
    return KandinskyV22CombinedPipeline(
        unet=UNet2DConditionModel(
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(8, 16),
            layers_per_block=1,
            encoder_hid_dim=CLIP_WIDTH,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
            resnet_time_scale_shift="scale_shift",
        ),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, variance_type="learned_range"),
        movq=VQModel(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            layers_per_block=1,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
        prior_prior=prior,
        prior_image_encoder=CLIPVisionModelWithProjection(vision),
        prior_text_encoder=clip(projected=True),
        prior_tokenizer=clip_tokenizer(),
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
        ),
        prior_image_processor=CLIPImageProcessor(crop_size=32, size=32),
    )


def schnell() -> FluxPipeline:
    return flux(told=False)


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
    "qwen": qwen,
    "kandinsky": kandinsky,
}
# What the published folders need no word about, as their sizes are those of the pipelines' tables and defaults.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "sdxl": {},
    "sd3": {"max_sequence_length": 16},
    "flux": {"height": 32, "width": 32, "max_sequence_length": 16},
    "pixart": {"use_resolution_binning": False, "max_sequence_length": 16},
    "sana": {
        **{"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 16},
        "complex_human_instruction": None,
    },
    "qwen": {"height": 32, "width": 32, "negative_prompt": " ", "max_sequence_length": 16},
    "kandinsky": {"height": 32, "width": 32, "prior_num_inference_steps": 2},
}


def save(family: str, folder: Path) -> Path:
    """The pipeline folder of a family, or of ``schnell``, with random weights from seed 0."""
    torch.manual_seed(0)
    {**FAMILIES, "schnell": schnell}[family]().save_pretrained(folder)
    return folder
