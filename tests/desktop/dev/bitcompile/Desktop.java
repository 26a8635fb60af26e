package dev.bitcompile;

import java.io.BufferedReader;
import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import org.json.JSONArray;

/** Drives the Android example's classes on a desktop, for the tests. */
public final class Desktop {
  private static final PrintStream OUT = utf8();

  private Desktop() {}

  /** The first argument names what to do, the rest is for it. */
  public static void main(String[] arguments) throws Exception {
    switch (arguments[0]) {
      case "generate":
        generate(arguments);
        break;
      case "tokenize":
        tokenize(new File(arguments[1]));
        break;
      case "install":
        install(new File(arguments[1]), new File(arguments[2]));
        break;
      case "cores":
        OUT.println(BigCores.count(new File(arguments[1]), 6));
        break;
      default:
        throw new IllegalArgumentException(arguments[0]);
    }
  }

  /** FOLDER PLUGIN CAPACITY COUNT TOKEN...: two turns, the second from an emptied cache. */
  private static void generate(String[] arguments) throws Exception {
    File folder = new File(arguments[1]);
    int capacity = Integer.parseInt(arguments[3]);
    int count = Integer.parseInt(arguments[4]);
    long[] prompt = new long[arguments.length - 5];
    for (int i = 0; i < prompt.length; i++) {
      prompt[i] = Long.parseLong(arguments[5 + i]);
    }
    try (BitcompileModel model = new BitcompileModel(folder, new File(arguments[2]), capacity, 1)) {
      for (int turn = 0; turn < 2; turn++) {
        model.rewind(0);
        final List<Long> streamed = new ArrayList<>();
        List<Long> answer =
            model.generate(
                prompt,
                count,
                new BitcompileModel.Listener() {
                  @Override
                  public boolean onToken(long token) {
                    return streamed.add(token);
                  }
                });
        OUT.println(new JSONArray(answer) + (streamed.equals(answer) ? "" : " not streamed"));
      }
      OUT.println(model.cacheBytes());
    }
  }

  /** Standard input: a JSON array of one text a line; output: its tokens, and their text. */
  private static void tokenize(File file) throws Exception {
    ByteLevelTokenizer tokenizer = new ByteLevelTokenizer(file);
    BufferedReader lines =
        new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    for (String line = lines.readLine(); line != null; line = lines.readLine()) {
      String text = new JSONArray(line).getString(0);
      ByteLevelTokenizer.Stream stream = tokenizer.stream();
      StringBuilder decoded = new StringBuilder();
      JSONArray ids = new JSONArray();
      for (long id : tokenizer.encode(text, true)) {
        ids.put(id);
        decoded.append(stream.add(id));
      }
      OUT.println(new JSONArray().put(ids).put(decoded.toString()));
    }
  }

  private static void install(final File from, File to) throws IOException {
    ArtifactFiles.install(
        new ArtifactFiles.Source() {
          @Override
          public InputStream open(String name) throws IOException {
            OUT.println(name);
            return new FileInputStream(new File(from, name));
          }
        },
        to);
  }

  private static PrintStream utf8() {
    try {
      return new PrintStream(System.out, true, "UTF-8");
    } catch (IOException error) {
      throw new IllegalStateException(error);
    }
  }
}
