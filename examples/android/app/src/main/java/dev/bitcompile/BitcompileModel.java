package dev.bitcompile;

import ai.onnxruntime.NodeInfo;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import ai.onnxruntime.TensorInfo;
import java.io.File;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.json.JSONArray;
import org.json.JSONException;
import org.json.JSONObject;

/**
 * A decoder language model made by {@code bitcompile build}, in ONNX Runtime's Java API.
 *
 * <p>The key-value cache is one buffer a tensor, given to ONNX Runtime as both past and present, so
 * that attention appends to it in place. Weights stay in the mapped file. One thread at a time may
 * use a model; keep it off the user interface's thread.
 */
public final class BitcompileModel implements AutoCloseable {
  /** Receives tokens as they come. */
  public interface Listener {
    /** Called once a token; returns whether to go on. */
    boolean onToken(long token);
  }

  private static final String LOGITS = "logits";
  private static final String PAST = "past_key_values.";

  private final OrtEnvironment environment;
  private final OrtSession session;
  private final int capacity;
  private final int vocabulary;
  private final Set<Long> ends;
  private final Map<String, OnnxTensor> inputs = new HashMap<>();
  private final Map<String, OnnxTensor> caches = new HashMap<>();
  private final LongBuffer ones;
  private final List<ByteBuffer> buffers = new ArrayList<>();
  private long cacheBytes;
  private int length;

  /**
   * Opens the artifact in {@code folder}.
   *
   * @param plugin libbitcompile_ops.so; on Android in applicationInfo.nativeLibraryDir
   * @param capacity most tokens the cache holds, prompt and answer of all turns
   * @param threads size of the thread pool: the big cores, see {@link BigCores}
   * @throws IOException for files that are missing or damaged
   * @throws OrtException with ONNX Runtime's or the plugin's reason
   */
  public BitcompileModel(File folder, File plugin, int capacity, int threads)
      throws IOException, OrtException {
    JSONObject model = config(new File(folder, "genai_config.json"));
    int context = model.optInt("context_length");
    if (capacity < 1 || capacity > context) {
      throw new IllegalArgumentException(
          "capacity " + capacity + " is not between 1 and the model's context of " + context);
    }
    require(new File(folder, "model.onnx"));
    require(new File(folder, "model.onnx.data"));
    require(plugin);
    this.capacity = capacity;
    this.vocabulary = model.optInt("vocab_size");
    this.ends = ends(model);
    this.ones = longs(capacity);
    for (int i = 0; i < capacity; i++) {
      ones.put(i, 1);
    }
    environment = OrtEnvironment.getEnvironment();
    environment.setTelemetry(false); // a model on the device has nothing to tell
    session = open(new File(folder, "model.onnx"), plugin, threads);
    boolean good = false;
    try {
      makeCaches();
      good = true;
    } finally {
      if (!good) {
        close();
      }
    }
  }

  private OrtSession open(File model, File plugin, int threads) throws OrtException {
    try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
      options.setIntraOpNumThreads(threads);
      // Idle threads that spin are faster by a little and cost battery and heat.
      options.addConfigEntry("session.intra_op.allow_spinning", "0");
      options.registerCustomOpLibrary(plugin.getAbsolutePath());
      // By path and not by bytes: only then are the weights mapped.
      return environment.createSession(model.getAbsolutePath(), options);
    }
  }

  private void makeCaches() throws OrtException {
    for (Map.Entry<String, NodeInfo> input : session.getInputInfo().entrySet()) {
      String name = input.getKey();
      if (!name.startsWith(PAST)) {
        continue;
      }
      long[] shape = ((TensorInfo) input.getValue().getInfo()).getShape();
      shape[0] = 1;
      shape[2] = capacity;
      int bytes = Math.toIntExact(Float.BYTES * shape[1] * shape[2] * shape[3]);
      ByteBuffer buffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder());
      buffers.add(buffer); // the tensor uses this memory
      OnnxTensor cache = OnnxTensor.createTensor(environment, buffer.asFloatBuffer(), shape);
      inputs.put(name, cache);
      caches.put("present." + name.substring(PAST.length()), cache);
      cacheBytes += bytes;
    }
    if (caches.isEmpty()) {
      throw new IllegalArgumentException("not a language model of `bitcompile build`");
    }
  }

  /** Tokens that end an answer. */
  public Set<Long> ends() {
    return ends;
  }

  /** Bytes of the key-value cache; Android counts direct buffers to the Java heap. */
  public long cacheBytes() {
    return cacheBytes;
  }

  /** Tokens the cache holds. */
  public int length() {
    return length;
  }

  /** Forgets all but the first {@code kept} tokens; 0 starts anew. Costs nothing. */
  public void rewind(int kept) {
    length = Math.max(0, Math.min(length, kept));
  }

  /**
   * Reads {@code tokens} behind those the cache holds.
   *
   * @return the logits of the last one, float32 [vocabulary]
   */
  public float[] feed(long[] tokens) throws OrtException {
    if (tokens.length == 0) {
      throw new IllegalArgumentException("no tokens: feed at least one");
    }
    int total = length + tokens.length;
    if (total > capacity) {
      throw new IllegalStateException(
          total + " tokens do not fit the cache of " + capacity + ": rewind it, or open a larger");
    }
    for (long token : tokens) { // ONNX Runtime does not check them
      if (token < 0 || token >= vocabulary) {
        throw new IllegalArgumentException(
            token + " is not in the vocabulary: is the tokenizer this model's?");
      }
    }
    LongBuffer ids = longs(tokens.length);
    ids.put(tokens).rewind();
    LongBuffer mask = ones.duplicate();
    mask.limit(total);
    try (OnnxTensor feed = OnnxTensor.createTensor(environment, ids, row(tokens.length));
        OnnxTensor seen = OnnxTensor.createTensor(environment, mask.slice(), row(total))) {
      inputs.put("input_ids", feed);
      inputs.put("attention_mask", seen);
      try (OrtSession.Result result = session.run(inputs, Collections.singleton(LOGITS), caches)) {
        length = total;
        return lastRow((OnnxTensor) result.get(LOGITS).get());
      }
    } finally {
      inputs.remove("input_ids");
      inputs.remove("attention_mask");
    }
  }

  /**
   * Reads {@code prompt}, then generates greedily until an end token, a full cache, {@code most}
   * tokens, or a listener that has enough. The last token is not in the cache yet: begin the next
   * turn's tokens with it.
   */
  public List<Long> generate(long[] prompt, int most, Listener listener) throws OrtException {
    List<Long> answer = new ArrayList<>();
    float[] logits = feed(prompt);
    while (true) {
      long token = argmax(logits);
      answer.add(token);
      boolean more = listener.onToken(token);
      if (!more || ends.contains(token) || answer.size() >= most || length == capacity) {
        return answer;
      }
      logits = feed(new long[] {token});
    }
  }

  /** The token with the greatest logit. */
  public static long argmax(float[] logits) {
    int best = 0;
    for (int i = 1; i < logits.length; i++) {
      if (logits[i] > logits[best]) {
        best = i;
      }
    }
    return best;
  }

  @Override
  public void close() throws OrtException {
    for (OnnxTensor cache : caches.values()) {
      cache.close();
    }
    session.close();
  }

  /** A model built with {@code --logits all} gives a row a token. */
  private static float[] lastRow(OnnxTensor logits) {
    long[] shape = logits.getInfo().getShape();
    FloatBuffer all = logits.getFloatBuffer();
    float[] row = new float[(int) shape[2]];
    all.position(all.limit() - row.length);
    all.get(row);
    return row;
  }

  private static long[] row(int count) {
    return new long[] {1, count};
  }

  private static LongBuffer longs(int count) {
    return ByteBuffer.allocateDirect(Long.BYTES * count)
        .order(ByteOrder.nativeOrder())
        .asLongBuffer();
  }

  private static void require(File file) throws IOException {
    if (!file.isFile()) {
      throw new IOException(file + " is missing: install the artifact again");
    }
  }

  private static JSONObject config(File file) throws IOException {
    require(file);
    try {
      return new JSONObject(Text.read(file)).getJSONObject("model");
    } catch (JSONException error) {
      throw new IOException(file + " is damaged: " + error.getMessage(), error);
    }
  }

  private static Set<Long> ends(JSONObject model) {
    Set<Long> ends = new HashSet<>();
    JSONArray several = model.optJSONArray("eos_token_id");
    if (several == null) {
      ends.add(model.optLong("eos_token_id", -1));
      return ends;
    }
    for (int i = 0; i < several.length(); i++) {
      ends.add(several.optLong(i));
    }
    return ends;
  }
}
