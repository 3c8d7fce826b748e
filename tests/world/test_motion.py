"""Ways of a view over a scene, in closed form."""

from __future__ import annotations

import numpy as np

from longtake.world.motion import Camera, Paused


def test_a_paused_camera_stands_still_and_goes_on_where_it_stood() -> None:
    camera = Camera(travel=2.0, speed=0.02, start=0.0)
    paused = Paused(camera, begin=30, num_frames=50)
    frames = np.arange(400)
    offsets = paused.offsets(frames)
    assert np.array_equal(offsets[:31], camera.offsets(frames[:31]))
    assert np.ptp(offsets[30:81]) == 0
    assert np.array_equal(offsets[80:], camera.offsets(frames[30:350]))
    assert paused.panning
    assert not Paused(Camera(), 3, 4).panning
