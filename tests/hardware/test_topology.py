"""Names and sizes of slices, copied by hand from Google's tables and the TPU compiler's messages."""

import dataclasses

import pytest

from phivision_jax.hardware.topology import CHIPS, parse_topology


@pytest.mark.parametrize(
    ("cloud", "xla", "chips", "devices", "hosts"),
    [
        ("v4-8", "v4:2x2x1", 4, 4, 1),
        ("v4-128", "v4:4x4x4", 64, 64, 16),
        ("tpu7x-8", "tpu7x:2x2x1", 4, 8, 1),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128, 16),
        ("v5p-8", "v5p:2x2x1", 4, 4, 1),
        ("v5p-32", "v5p:2x2x4", 16, 16, 4),
        ("v5p-256", "v5p:4x4x8", 128, 128, 32),
        ("v5p-512", "v5p:4x8x8", 256, 256, 64),
        ("v5p-12288", "v5p:16x16x24", 6144, 6144, 1536),
        ("v5litepod-1", "v5e:1x1", 1, 1, 1),
        ("v5litepod-8", "v5e:2x4", 8, 8, 1),
        ("v5litepod-16", "v5e:4x4", 16, 16, 4),
        ("v5litepod-256", "v5e:16x16", 256, 256, 64),
        ("v6e-4", "v6e:2x2", 4, 4, 1),
        ("v6e-32", "v6e:4x8", 32, 32, 8),
        ("v6e-256", "v6e:16x16", 256, 256, 64),
    ],
)
def test_parse_topology_cloud_and_xla_names_agree(cloud, xla, chips, devices, hosts):
    topology = parse_topology(cloud)
    assert topology == parse_topology(xla)
    assert (topology.xla_name, topology.cloud_name) == (xla, cloud)
    assert (topology.chips, topology.devices, topology.hosts) == (chips, devices, hosts)
    assert topology.chips == topology.hosts * topology.chips_per_host


@pytest.mark.parametrize(
    ("written", "xla"),
    [
        ("v5e-8", "v5e:2x4"),
        ("v5lite-8", "v5e:2x4"),
        ("V6E-8", "v6e:2x4"),
        ("tpu-v6e-8", "v6e:2x4"),
        ("trillium-8", "v6e:2x4"),
        ("v5litepod:4x4", "v5e:4x4"),
        ("v5p-4x4x8", "v5p:4x4x8"),
        ("TPU-v5p-8", "v5p:2x2x1"),
        ("v7x-8", "tpu7x:2x2x1"),
        ("ironwood:4x4x4", "tpu7x:4x4x4"),
    ],
)
def test_parse_topology_names_as_users_write_them(written, xla):
    assert parse_topology(written).xla_name == xla


@pytest.mark.parametrize("name", ["h100", "H100-8", "8xH100", "a100:8", "nvidia-l4", "a3-highgpu-8g", "b200", "mi300x"])
def test_parse_topology_names_a_gpu(name):
    with pytest.raises(ValueError, match=f"'{name}' names a GPU; preflight compiles for TPU slices only"):
        parse_topology(name)


def test_parse_topology_chips_and_rates():
    v5p, v4 = parse_topology("v5p:4x4x8").chip, parse_topology("v4:4x4x8").chip
    assert (v5p.devices, v5p.hbm_bytes) == (1, int(95.74 * 2**30))
    assert (v5p.peak_bf16_flops, v5p.hbm_bandwidth, v5p.ici_bandwidth, v5p.dcn_bandwidth) == (
        459e12,
        2765e9,
        1200e9,
        6.25e9,
    )
    assert (v4.devices, v4.hbm_bytes) == (1, 30.75 * 2**30)
    assert [CHIPS[name].host_bytes * 4 / 1e9 for name in ("v4", "v5e", "v5p", "v6e")] == [407, 192, 448, 720]
    assert (v4.ici_bandwidth, v4.dcn_bandwidth) == (None, None)
    assert parse_topology("v6e-8").chip.dcn_bandwidth == 12.5e9
    assert parse_topology("v5litepod-8").chip.dcn_bandwidth == 3.125e9


def test_parse_topology_slices():
    one, two = parse_topology("v5p-256"), parse_topology("v5p:4x4x8", slices=2)
    assert two == dataclasses.replace(one, slices=2)
    assert (two.chips, two.devices, two.hosts, two.chips_per_host) == (256, 256, 64, 4)
    assert (two.xla_name, two.cloud_name, two.shape) == ("v5p:4x4x8", "v5p-256", "4x4x8")
    assert str(one) == "v5p:4x4x8 (v5p-256): 128 chips, 32 hosts of 4"
    assert str(two) == "2 slices of v5p:4x4x8 (v5p-256): 256 chips, 64 hosts of 4"
    assert parse_topology("v6e-8", slices=3).hosts == 3
    with pytest.raises(ValueError, match="at least 1, not 0"):
        parse_topology("v5p-256", slices=0)


@pytest.mark.parametrize(("name", "hosts"), [("v5p:8x8x4", 64), ("v5p:4x4x12", 48), ("v4:12x12x24", 864)])
def test_parse_topology_cubes_without_cloud_name(name, hosts):
    topology = parse_topology(name)
    assert (topology.xla_name, topology.cloud_name, topology.hosts) == (name, None, hosts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p:4x4x7", "no slice of shape 4x4x7; the nearest is v5p:4x4x8 .128 chips"),
        ("v5p:4x8", "the nearest is v5p:2x4x4 .32 chips"),
        ("v5p:1x1x1", "the nearest is v5p:2x2x1"),
        ("v5p:0x4x4", "the nearest is v5p:2x2x1"),
        ("v5p:16x16x28", "the nearest is v5p:16x16x24 .6144 chips"),
        ("v4:16x16x20", "the nearest is v4:16x16x16"),
        ("v5e:16x32", "the nearest is v5e:16x16"),
        ("v6e:8x4", "the nearest is v6e:4x8 .32 chips"),
        ("v6e:4x4x4", "the nearest is v6e:8x8"),
        ("v5p-200", "TensorCores, two per chip.; the nearest is v5p-256, which is v5p:4x4x8"),
        ("v6e-200", "counts chips.; the nearest is v6e-256, which is v6e:16x16"),
        ("v5litepod-0", "the nearest is v5litepod-1, "),
        ("v3-8", "'v3' is none of v4, v5e, v5p, v6e, tpu7x; the nearest is v4-8"),
        ("v5e-250", "the nearest is v5litepod-256, which is v5e:16x16"),
        ("v5p4x4x8", "not a name like v5p:4x4x8 or v5p-256; the nearest is v5p:4x4x8"),
        ("", "not a name like"),
    ],
)
def test_parse_topology_wrong_name_suggests_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(name)


def test_chips_shapes_have_distinct_sizes():
    for generation, chip in CHIPS.items():
        parsed = [parse_topology(f"{generation}:{shape}") for shape in chip.shapes]
        assert [t.cloud_name is not None and parse_topology(t.cloud_name) for t in parsed] == parsed
        assert sorted({t.chips for t in parsed}) == [t.chips for t in parsed]
        assert parsed[-1].chips == {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256, "tpu7x": 9216}[generation]
