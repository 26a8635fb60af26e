package dev.bitcompile;

import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;

/** Small files as text. */
final class Text {
  private Text() {}

  static String read(File file) throws IOException {
    try (InputStream in = new FileInputStream(file)) {
      return read(in);
    }
  }

  /** All of {@code in}, which stays open, as UTF-8. */
  static String read(InputStream in) throws IOException {
    ByteArrayOutputStream out = new ByteArrayOutputStream();
    byte[] block = new byte[1 << 16];
    for (int count = in.read(block); count >= 0; count = in.read(block)) {
      out.write(block, 0, count);
    }
    return new String(out.toByteArray(), StandardCharsets.UTF_8);
  }
}
