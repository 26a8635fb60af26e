package dev.bitcompile;

import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Iterator;
import java.util.List;
import org.json.JSONException;
import org.json.JSONObject;

/**
 * Puts an artifact into a folder of plain files, once.
 *
 * <p>Weights are mapped from a file, and an asset or a download stream is none. Every file is
 * checked against the SHA-256 of the artifact's manifest while it is copied; the manifest is
 * written last, so that its presence says the folder is whole.
 */
public final class ArtifactFiles {
  /** Where files come from: assets, or a download. */
  public interface Source {
    /** Opens the artifact's file {@code name}; the caller closes it. */
    InputStream open(String name) throws IOException;
  }

  /** The manifest of an artifact. */
  public static final String MANIFEST = "bitcompile.json";

  private ArtifactFiles() {}

  /**
   * Makes {@code folder} hold the artifact of {@code source}, unless it does.
   *
   * <p>The plugin (Android installs it itself) and the files to link against are left out.
   *
   * @throws IOException if a file cannot be read or written, or is damaged
   */
  public static void install(Source source, File folder) throws IOException {
    String manifest;
    try (InputStream in = source.open(MANIFEST)) {
      manifest = Text.read(in);
    }
    File marker = new File(folder, MANIFEST);
    if (marker.isFile() && Text.read(marker).equals(manifest)) {
      return;
    }
    if (marker.exists() && !marker.delete() || !folder.isDirectory() && !folder.mkdirs()) {
      throw new IOException("cannot write " + folder);
    }
    try {
      JSONObject files = new JSONObject(manifest).getJSONObject("files");
      for (String name : names(files)) {
        copy(source, name, folder, files.getJSONObject(name).getString("sha256"));
      }
    } catch (JSONException error) {
      throw new IOException(MANIFEST + " is damaged: " + error.getMessage(), error);
    }
    File written = new File(folder, MANIFEST + ".tmp");
    try (OutputStream out = new FileOutputStream(written)) {
      out.write(manifest.getBytes("UTF-8"));
    }
    if (!written.renameTo(marker)) {
      throw new IOException("cannot write " + marker);
    }
  }

  private static List<String> names(JSONObject files) throws IOException {
    List<String> names = new ArrayList<>();
    for (Iterator<?> keys = files.keys(); keys.hasNext(); ) {
      String name = (String) keys.next();
      if (name.startsWith("/") || Arrays.asList(name.split("/")).contains("..")) {
        throw new IOException(MANIFEST + " names a file outside the artifact: " + name);
      }
      if (!name.endsWith(".so") && !name.endsWith(".a") && !name.endsWith(".h")) {
        names.add(name);
      }
    }
    return names;
  }

  private static void copy(Source source, String name, File folder, String sha256)
      throws IOException {
    File file = new File(folder, name);
    File parent = file.getParentFile();
    if (!parent.isDirectory() && !parent.mkdirs()) {
      throw new IOException("cannot write " + parent);
    }
    MessageDigest digest = sha256();
    byte[] block = new byte[1 << 16];
    try (InputStream in = source.open(name);
        OutputStream out = new FileOutputStream(file)) {
      for (int count = in.read(block); count >= 0; count = in.read(block)) {
        digest.update(block, 0, count);
        out.write(block, 0, count);
      }
    }
    if (!hex(digest.digest()).equals(sha256)) {
      throw new IOException(name + " is damaged: its SHA-256 is not the one in " + MANIFEST);
    }
  }

  private static MessageDigest sha256() throws IOException {
    try {
      return MessageDigest.getInstance("SHA-256");
    } catch (NoSuchAlgorithmException error) {
      throw new IOException(error);
    }
  }

  private static String hex(byte[] bytes) {
    StringBuilder text = new StringBuilder();
    for (byte value : bytes) {
      text.append(Character.forDigit(value >> 4 & 15, 16)).append(Character.forDigit(value & 15, 16));
    }
    return text.toString();
  }
}
