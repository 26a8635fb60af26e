package dev.bitcompile;

import java.io.File;
import java.io.IOException;

/**
 * How many cores are not of the slowest kind: the threads a model should have.
 *
 * <p>An operator waits for its last thread, so that one little core makes every big one wait.
 */
public final class BigCores {
  private BigCores() {}

  /** Big cores of this device; half of all cores where the system does not say. */
  public static int count() {
    return count(new File("/sys/devices/system/cpu"), Runtime.getRuntime().availableProcessors());
  }

  /** The same for the sysfs folder {@code cpus}, with {@code cores} where it does not say. */
  static int count(File cpus, int cores) {
    int big = 0;
    int all = 0;
    long slowest = Long.MAX_VALUE;
    for (int cpu = 0; frequency(cpus, cpu) > 0; cpu++) {
      slowest = Math.min(slowest, frequency(cpus, cpu));
    }
    for (; frequency(cpus, all) > 0; all++) {
      big += frequency(cpus, all) > slowest ? 1 : 0;
    }
    if (all == 0) {
      return Math.max(1, cores / 2);
    }
    return big == 0 ? all : big; // cores of one kind are all big
  }

  /** Highest frequency of a core in kHz; 0 if unknown. */
  private static long frequency(File cpus, int cpu) {
    try {
      File file = new File(cpus, "cpu" + cpu + "/cpufreq/cpuinfo_max_freq");
      return file.canRead() ? Long.parseLong(Text.read(file).trim()) : 0;
    } catch (IOException | NumberFormatException error) {
      return 0;
    }
  }
}
