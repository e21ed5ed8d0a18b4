"""A small ISMRMRD file, written with h5py in the layout of the format (fields of ismrmrd.h)."""

import h5py
import numpy as np

_STEPS = ("kspace_encode_step_1", "kspace_encode_step_2")
COUNTERS = (*_STEPS, "average", "slice", "contrast", "phase", "repetition", "set", "segment")
IDX = np.dtype([*((name, "<u2") for name in COUNTERS), ("user", "<u2", (8,))])
VECTORS = ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position")
HEAD = np.dtype([
    ("version", "<u2"), ("flags", "<u8"), ("measurement_uid", "<u4"), ("scan_counter", "<u4"),
    ("acquisition_time_stamp", "<u4"), ("physiology_time_stamp", "<u4", (3,)), ("number_of_samples", "<u2"),
    ("available_channels", "<u2"), ("active_channels", "<u2"), ("channel_mask", "<u8", (16,)), ("discard_pre", "<u2"),
    ("discard_post", "<u2"), ("center_sample", "<u2"), ("encoding_space_ref", "<u2"), ("trajectory_dimensions", "<u2"),
    ("sample_time_us", "<f4"), *((name, "<f4", (3,)) for name in VECTORS), ("idx", IDX), ("user_int", "<i4", (8,)),
    ("user_float", "<f4", (8,)),
])  # fmt: skip
FLOATS = h5py.vlen_dtype(np.float32)
ACQUISITION = np.dtype([("head", HEAD), ("traj", FLOATS), ("data", FLOATS)])
NOISE, CALIBRATION, REVERSE, NAVIGATOR, CORRECTION = (1 << n - 1 for n in (19, 20, 22, 23, 24))


def xml(
    matrix=(128, 40, 1), field=(128, 30, 4.5), recon=(64, 30, 4.5), trajectory="cartesian", centre=None, more="",
    centre_2=None,
):  # fmt: skip
    def space(name, mm):
        size = "".join(f"<{axis}>{n}</{axis}>" for axis, n in zip("xyz", matrix, strict=True))
        width = "".join(f"<{axis}>{n}</{axis}>" for axis, n in zip("xyz", mm, strict=True))
        return f"<{name}><matrixSize>{size}</matrixSize><fieldOfView_mm>{width}</fieldOfView_mm></{name}>"

    limits = "" if centre is None else (
        f"<encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{matrix[1] - 1}</maximum>"
        f"<center>{centre}</center></kspace_encoding_step_1></encodingLimits>"
    )  # fmt: skip
    if centre_2 is not None:
        step = f"<kspace_encoding_step_2><center>{centre_2}</center></kspace_encoding_step_2>"
        limits = f"<encodingLimits>{step}</encodingLimits>"
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><subjectInformation><patientName>DOE'
        "</patientName></subjectInformation><acquisitionSystemInformation><institutionName>CANARY</institutionName>"
        "<relativeReceiverNoiseBandwidth>0.8</relativeReceiverNoiseBandwidth></acquisitionSystemInformation><encoding>"
        f"{space('encodedSpace', field)}{space('reconSpace', recon)}{limits}<trajectory>{trajectory}</trajectory>{more}"
        "</encoding></ismrmrdHeader>"
    )


def epi(**times):
    """The description of an EPI readout, in microseconds."""
    named = "".join(
        f"<userParameterLong><name>{k}</name><value>{v}</value></userParameterLong>" for k, v in times.items()
    )
    return f"<trajectoryDescription><identifier>ConventionalEPI</identifier>{named}</trajectoryDescription>"


def acquisition(samples, traj=None, **head):
    """One line of ``samples`` ``(coils, n)``, its trajectory ``(n, dimensions)``; counters and fields by name."""
    line = np.zeros(1, ACQUISITION)
    samples = np.ascontiguousarray(samples, np.complex64)
    coils, count = samples.shape
    fields = {"version": 1, "active_channels": coils, "available_channels": coils, "number_of_samples": count}
    fields |= {"center_sample": count // 2, "sample_time_us": 5.0, "read_dir": (0, 1, 0), "phase_dir": (1, 0, 0)}
    for name, value in (fields | {"slice_dir": (0, 0, 1)} | head).items():
        target = line["head"]["idx"] if name in COUNTERS else line["head"]
        target[name] = value
    k = np.zeros((count, 0)) if traj is None else np.asarray(traj)
    line["head"]["trajectory_dimensions"] = head.get("trajectory_dimensions", k.shape[1])
    line["traj"][0], line["data"][0] = k.astype(np.float32).ravel(), samples.view(np.float32).ravel()
    return line[0]


def write(path, lines, header=None):
    with h5py.File(path, "w") as file:
        group = file.create_group("dataset")
        text = group.create_dataset("xml", (1,), h5py.special_dtype(vlen=bytes))
        text[0] = header or xml()
        data = group.create_dataset("data", (len(lines),), ACQUISITION, maxshape=(None,))
        for n, line in enumerate(lines):
            data[n] = line
    return path


def lines_of(kspace, spacing=4.5, **head):
    """All lines of ``kspace`` ``(slices, coils, readout, phase)``, 4.5 mm apart, in an interleaved order."""
    order = [*range(0, len(kspace), 2), *range(1, len(kspace), 2)]
    return [
        acquisition(kspace[s, :, :, row], slice=s, kspace_encode_step_1=row, position=(3, -2, 10 + spacing * s), **head)
        for row in range(kspace.shape[3])
        for s in order
    ]
