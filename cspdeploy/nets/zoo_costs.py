"""What each network of the registry costs for one image of its own size, measured once: `cspdeploy list` reads it here.

To make it again: `cspdeploy.nets.cost.measure_cost(spec_of(network))`, which a test compares every row with.
"""

from __future__ import annotations

__all__ = ["ZOO_COSTS"]

ZOO_COSTS: dict[str, tuple[int, int]] = {
    "cspresnet50": (21_616_168, 4_517_240_832),
    "cspresnet50d": (21_635_400, 4_830_240_768),
    "cspresnet50w": (28_118_216, 5_020_008_448),
    "cspresnext50": (20_569_896, 4_014_948_352),
    "cspdarknet53": (27_642_184, 6_533_652_480),
    "cspdarknet21": (17_265_224, 3_849_297_920),
    "cs3darknet_s": (3_276_344, 712_232_960),
    "cs3darknet_m": (9_310_240, 2_068_690_944),
    "cs3darknet_l": (21_164_168, 4_847_017_984),
    "cs3darknet_x": (35_046_320, 8_355_153_920),
    "cs3darknet_focus_s": (3_274_728, 686_280_704),
    "cs3darknet_focus_m": (9_304_360, 1_973_139_456),
    "cs3darknet_focus_l": (21_151_720, 4_644_118_528),
    "cs3darknet_focus_x": (35_025_000, 8_007_157_760),
    "cs3sedarknet_l": (21_913_592, 4_847_761_408),
    "cs3sedarknet_x": (35_397_904, 8_355_498_240),
    "cs3sedarknet_xdw": (21_601_488, 5_933_825_024),
    "cs3edgenet_x": (47_821_120, 11_500_881_920),
    "cs3se_edgenet_x": (50_721_584, 11_503_769_600),
    "csdarknet53": (27_642_184, 6_533_652_480),
    "csdarknet53-omega": (27_642_184, 6_533_652_480),
    "csresnet50": (21_607_848, 4_483_686_400),
    "csresnet50-omega": (21_607_848, 4_483_686_400),
    "csresnext50": (20_557_480, 3_964_616_704),
    "csresnext50-omega": (20_557_480, 3_964_616_704),
    "cspdensenet121": (7_149_576, 2_548_359_168),
    "cspdensenet169": (12_511_496, 3_011_019_776),
    "cspdensenet201": (17_921_800, 3_872_697_344),
    "cspdensenet201_fusion_first": (17_226_728, 3_503_000_576),
    "cspdensenet201_fusion_last": (16_842_280, 3_758_296_064),
    "csppeleenet": (2_856_488, 446_141_440),
    "csppeleenet_fusion_first": (2_456_648, 339_166_208),
    "csppeleenet_fusion_last": (2_013_608, 383_321_088),
    "csppeleenet_gamma25": (3_229_240, 505_750_528),
    "csppeleenet_gamma25_fusion_first": (2_629_448, 365_659_136),
    "csppeleenet_gamma25_fusion_last": (2_386_360, 442_930_176),
    "darknet17": (14_304_840, 3_245_318_144),
    "darknet21": (20_863_048, 3_916_406_784),
    "sedarknet21": (20_950_432, 3_916_492_288),
    "darknet53": (41_609_928, 9_285_115_904),
    "darknetaa53": (36_022_984, 7_942_938_624),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnext50_32x4d": (25_028_904, 4_230_479_872),
    "densenet121": (7_978_856, 2_834_161_664),
    "densenet169": (14_149_480, 3_359_843_328),
    "densenet201": (20_013_928, 4_291_365_888),
    "peleenet": (2_802_248, 507_757_568),
    "yolov4": (64_363_101, 64_194_741_248),
    "yolov4-tiny": (6_056_606, 3_453_938_176),
    "yolov4-csp": (52_921_437, 38_476_709_888),
}
"""Learnable values and multiply-accumulates by name."""
