"""Camera files of other programs and data sets, read into the convention of `jvgen.geometry.cameras`."""
