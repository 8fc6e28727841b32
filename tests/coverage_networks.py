"""The networks of the coverage table: all CNN classifiers of torchvision, 78 of timm.

HELD_OUT was put aside before the tracer learned what the other networks need.
"""

TORCHVISION_LEFT_OUT = ("vit", "swin", "maxvit")  # transformers

TIMM = (
    "bat_resnext26ts", "botnet26t_256", "convmixer_768_32", "convnext_atto", "convnextv2_atto",
    "cspdarknet53", "cspresnet50", "darknet53", "densenetblur121d", "dm_nfnet_f0", "dpn68",
    "eca_nfnet_l0", "ecaresnet26t", "edgenext_xx_small", "efficientnet_b0", "efficientnet_b0_gn",
    "efficientnetv2_rw_t", "ese_vovnet19b_dw", "fbnetc_100", "fbnetv3_b", "focalnet_tiny_srf",
    "gcresnet33ts", "ghostnet_100", "halonet26t", "hardcorenas_a", "inception_next_atto",
    "inception_resnet_v2", "inception_v4", "lcnet_050", "legacy_senet154", "mambaout_femto",
    "mixnet_s", "mnasnet_small", "mobilenetv2_100", "mobilenetv3_small_100", "nasnetalarge",
    "nf_resnet26", "poolformer_s12", "regnetx_002", "regnety_002", "regnetz_b16", "repvgg_a0",
    "repvit_m1", "res2net50_26w_4s", "resnest14d", "resnet26d", "resnetblur50",
    "resnetv2_50x1_bit", "resnext50_32x4d", "rexnet_100", "semnasnet_075", "seresnext26d_32x4d",
    "skresnet18", "spnasnet_100", "tf_efficientnet_lite0", "tinynet_e", "vgg11", "cspnext_tiny",
)  # fmt: skip
HELD_OUT = (
    "convformer_s18", "cs3darknet_s", "dla34", "fasternet_t0", "gernet_s", "ghostnetv2_100",
    "hgnetv2_b0", "hrnet_w18_small", "lambda_resnet26t", "mobilenetv4_conv_small", "mobileone_s0",
    "nf_regnet_b0", "pnasnet5large", "rdnet_tiny", "repghostnet_050", "resnetv2_50", "selecsls42b",
    "starnet_s1", "tresnet_m", "xception41",
)  # fmt: skip


def torchvision_networks() -> list[str]:
    """Every classification CNN that torchvision has."""
    from torchvision import models

    names = models.list_models(module=models)
    return [name for name in names if not name.startswith(TORCHVISION_LEFT_OUT)]
