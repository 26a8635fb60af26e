package dev.bitcompile;

import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.CharBuffer;
import java.nio.charset.CharsetDecoder;
import java.nio.charset.CodingErrorAction;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Collections;
import java.util.Comparator;
import java.util.HashMap;
import java.util.HashSet;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.json.JSONArray;
import org.json.JSONException;
import org.json.JSONObject;

/**
 * Reads a Hugging Face {@code tokenizer.json} of the byte-level BPE kind (GPT-2, Llama 3, Qwen,
 * BitNet b1.58 2B-4T) and gives the same tokens. Other kinds are refused: use onnxruntime-extensions
 * or DJL's tokenizers there.
 */
public final class ByteLevelTokenizer {
  /** The split of a ByteLevel pre-tokenizer, as GPT-2 defined it. */
  private static final String GPT2 =
      "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

  /** Unicode's White_Space, which {@code \s} means there, and here only in some runtimes. */
  private static final String SPACE =
      "\\t-\\r \\x85\\xA0\\u1680\\u2000-\\u200A\\u2028\\u2029\\u202F\\u205F\\u3000";

  private final Map<String, Integer> vocabulary = new HashMap<>();
  private final Map<Integer, String> tokens = new HashMap<>();
  private final Map<Long, Integer> ranks = new HashMap<>();
  private final Map<Integer, Integer> merged = new HashMap<>();
  private final Map<String, Integer> added = new HashMap<>();
  private final Set<Integer> special = new HashSet<>();
  private final List<Integer> before = new ArrayList<>();
  private final List<Integer> after = new ArrayList<>();
  private final char[] letters = letters();
  private final Map<Character, Integer> bytes = new HashMap<>();
  private final boolean ignoreMerges;
  private final Pattern split;
  private final Pattern addedPattern;

  /**
   * Reads {@code tokenizer.json}.
   *
   * @throws IOException if it cannot be read, is damaged or of another kind
   */
  public ByteLevelTokenizer(File file) throws IOException {
    try {
      JSONObject json = new JSONObject(Text.read(file));
      JSONObject model = json.getJSONObject("model");
      refuseOtherModels(json, model);
      ignoreMerges = model.optBoolean("ignore_merges");
      readVocabulary(model.getJSONObject("vocab"));
      readMerges(model.getJSONArray("merges"));
      addedPattern = readAdded(json.optJSONArray("added_tokens"));
      split = readSplit(json.getJSONObject("pre_tokenizer"));
      readTemplate(json.optJSONObject("post_processor"));
    } catch (JSONException error) {
      throw new IOException(file + " is damaged: " + error.getMessage(), error);
    }
    for (int value = 0; value < 256; value++) {
      bytes.put(letters[value], value);
      if (!vocabulary.containsKey(String.valueOf(letters[value]))) {
        throw refused("a vocabulary without the byte " + value);
      }
    }
  }

  /** Tokens of {@code text}; {@code wrapped} adds those a prompt begins and ends with. */
  public long[] encode(String text, boolean wrapped) {
    List<Integer> ids = new ArrayList<>();
    if (wrapped) {
      ids.addAll(before);
    }
    int from = 0;
    if (addedPattern != null) {
      for (Matcher match = addedPattern.matcher(text); match.find(); from = match.end()) {
        encodeWords(text.substring(from, match.start()), ids);
        ids.add(added.get(match.group()));
      }
    }
    encodeWords(text.substring(from), ids);
    if (wrapped) {
      ids.addAll(after);
    }
    long[] result = new long[ids.size()];
    for (int i = 0; i < result.length; i++) {
      result[i] = ids.get(i);
    }
    return result;
  }

  /** A decoder for one answer. */
  public Stream stream() {
    return new Stream();
  }

  /** Text of tokens that come one by one: a character may be spread over several. */
  public final class Stream {
    private final CharsetDecoder decoder =
        StandardCharsets.UTF_8
            .newDecoder()
            .onMalformedInput(CodingErrorAction.REPLACE)
            .onUnmappableCharacter(CodingErrorAction.REPLACE);
    private byte[] rest = new byte[0];

    /** The text that {@code token} completes, maybe none; special tokens have none. */
    public String add(long token) {
      byte[] more = special.contains((int) token) ? new byte[0] : bytesOf((int) token);
      ByteBuffer in = ByteBuffer.allocate(rest.length + more.length);
      in.put(rest).put(more).flip();
      CharBuffer out = CharBuffer.allocate(in.remaining() + 1);
      decoder.decode(in, out, false);
      rest = new byte[in.remaining()];
      in.get(rest);
      out.flip();
      return out.toString();
    }
  }

  private byte[] bytesOf(int token) {
    String text = tokens.get(token);
    if (text == null) {
      return new byte[0];
    }
    if (added.containsKey(text)) {
      return text.getBytes(StandardCharsets.UTF_8);
    }
    ByteArrayOutputStream out = new ByteArrayOutputStream();
    for (char letter : text.toCharArray()) {
      out.write(bytes.get(letter));
    }
    return out.toByteArray();
  }

  private void encodeWords(String text, List<Integer> ids) {
    int from = 0;
    for (Matcher match = split.matcher(text); match.find(); from = match.end()) {
      encodeWord(text.substring(from, match.start()), ids);
      encodeWord(match.group(), ids);
    }
    encodeWord(text.substring(from), ids);
  }

  private void encodeWord(String word, List<Integer> ids) {
    if (word.isEmpty()) {
      return;
    }
    StringBuilder mapped = new StringBuilder();
    for (byte value : word.getBytes(StandardCharsets.UTF_8)) {
      mapped.append(letters[value & 255]);
    }
    Integer whole = ignoreMerges ? vocabulary.get(mapped.toString()) : null;
    if (whole != null) {
      ids.add(whole);
      return;
    }
    List<Integer> parts = new ArrayList<>();
    for (int i = 0; i < mapped.length(); i++) {
      parts.add(vocabulary.get(mapped.substring(i, i + 1)));
    }
    while (mergeFirst(parts)) {}
    ids.addAll(parts);
  }

  /** Joins the leftmost pair of lowest rank; false if no pair can be joined. */
  private boolean mergeFirst(List<Integer> parts) {
    int best = Integer.MAX_VALUE;
    int at = -1;
    for (int i = 0; i + 1 < parts.size(); i++) {
      Integer rank = ranks.get(pair(parts.get(i), parts.get(i + 1)));
      if (rank != null && rank < best) {
        best = rank;
        at = i;
      }
    }
    if (at < 0) {
      return false;
    }
    parts.set(at, merged.get(best));
    parts.remove(at + 1);
    return true;
  }

  private static long pair(int left, int right) {
    return (long) left << 32 | right;
  }

  private void refuseOtherModels(JSONObject json, JSONObject model) throws IOException {
    String type = model.optString("type", "BPE");
    if (!type.equals("BPE") || model.optBoolean("byte_fallback")) {
      throw refused("a " + type + " model that is not byte-level");
    }
    if (!json.isNull("normalizer")) {
      throw refused("a normalizer");
    }
    for (String key : new String[] {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!model.isNull(key) && !model.optString(key).isEmpty()) {
        throw refused(key);
      }
    }
  }

  private void readVocabulary(JSONObject json) throws JSONException {
    for (Iterator<?> keys = json.keys(); keys.hasNext(); ) {
      String token = (String) keys.next();
      vocabulary.put(token, json.getInt(token));
      tokens.put(json.getInt(token), token);
    }
  }

  /** Merges are pairs, or in older files texts with a blank between. */
  private void readMerges(JSONArray json) throws JSONException, IOException {
    for (int rank = 0; rank < json.length(); rank++) {
      JSONArray both = json.optJSONArray(rank);
      int blank = both == null ? json.getString(rank).indexOf(' ') : 0;
      String left = both == null ? json.getString(rank).substring(0, blank) : both.getString(0);
      String right = both == null ? json.getString(rank).substring(blank + 1) : both.getString(1);
      Integer[] ids = {
        vocabulary.get(left), vocabulary.get(right), vocabulary.get(left + right)
      };
      if (ids[0] == null || ids[1] == null || ids[2] == null) {
        throw refused("a merge of tokens that are not in the vocabulary");
      }
      ranks.put(pair(ids[0], ids[1]), rank);
      merged.put(rank, ids[2]);
    }
  }

  /** A pattern of all added tokens, longest first; null if there are none. */
  private Pattern readAdded(JSONArray json) throws JSONException, IOException {
    List<String> texts = new ArrayList<>();
    for (int i = 0; json != null && i < json.length(); i++) {
      JSONObject token = json.getJSONObject(i);
      for (String key : new String[] {"lstrip", "rstrip", "single_word"}) {
        if (token.optBoolean(key)) {
          throw refused("an added token with " + key);
        }
      }
      texts.add(token.getString("content"));
      added.put(token.getString("content"), token.getInt("id"));
      tokens.put(token.getInt("id"), token.getString("content"));
      if (token.optBoolean("special")) {
        special.add(token.getInt("id"));
      }
    }
    Collections.sort(texts, LONGEST);
    StringBuilder pattern = new StringBuilder();
    for (String text : texts) {
      pattern.append(pattern.length() == 0 ? "" : "|").append(Pattern.quote(text));
    }
    return texts.isEmpty() ? null : Pattern.compile(pattern.toString());
  }

  private static final Comparator<String> LONGEST =
      new Comparator<String>() {
        @Override
        public int compare(String one, String other) {
          return other.length() - one.length();
        }
      };

  /** ByteLevel alone (GPT-2's split), or a Split by a pattern and then ByteLevel without one. */
  private static Pattern readSplit(JSONObject json) throws JSONException, IOException {
    JSONObject last = json;
    String pattern = GPT2;
    if (json.getString("type").equals("Sequence")) {
      JSONArray steps = json.getJSONArray("pretokenizers");
      JSONObject first = steps.getJSONObject(0);
      last = steps.getJSONObject(steps.length() - 1);
      JSONObject by = first.optJSONObject("pattern");
      boolean fits = steps.length() == 2 && first.getString("type").equals("Split") && by != null;
      fits = fits && by.has("Regex") && first.getString("behavior").equals("Isolated");
      if (!fits || first.optBoolean("invert") || last.optBoolean("use_regex", true)) {
        throw refused("the pre-tokenizer " + json);
      }
      pattern = by.getString("Regex");
    }
    if (!last.getString("type").equals("ByteLevel") || last.optBoolean("add_prefix_space")) {
      throw refused("the pre-tokenizer " + json);
    }
    return Pattern.compile(unicodeSpaces(pattern));
  }

  /** {@code pattern} with {@code \s} and {@code \S} written out, in and outside of brackets. */
  private static String unicodeSpaces(String pattern) throws IOException {
    StringBuilder out = new StringBuilder();
    boolean inside = false;
    for (int i = 0; i < pattern.length(); i++) {
      char c = pattern.charAt(i);
      if (c != '\\') {
        inside = c == '[' || inside && c != ']';
        out.append(c);
        continue;
      }
      char next = pattern.charAt(++i);
      if (next == 'S' && inside) {
        throw refused("the pattern " + pattern);
      }
      String written = inside ? SPACE : next == 's' ? "[" + SPACE + "]" : "[^" + SPACE + "]";
      out.append(next == 's' || next == 'S' ? written : "\\" + next);
    }
    return out.toString();
  }

  /** The tokens that a template puts around one text; other processors do not change tokens. */
  private void readTemplate(JSONObject json) throws JSONException {
    if (json == null) {
      return;
    }
    JSONArray steps = json.optJSONArray("processors");
    for (int i = 0; steps != null && i < steps.length(); i++) {
      readTemplate(steps.getJSONObject(i));
    }
    JSONArray single = json.optJSONArray("single");
    List<Integer> side = before;
    for (int i = 0; single != null && i < single.length(); i++) {
      JSONObject token = single.getJSONObject(i).optJSONObject("SpecialToken");
      if (token == null) {
        side = after;
        continue;
      }
      JSONArray ids =
          json.getJSONObject("special_tokens").getJSONObject(token.getString("id")).getJSONArray("ids");
      for (int j = 0; j < ids.length(); j++) {
        side.add(ids.getInt(j));
      }
    }
  }

  private static IOException refused(String what) {
    return new IOException(
        "this tokenizer has "
            + what
            + ", which the example cannot do: use onnxruntime-extensions or ai.djl.huggingface");
  }

  /** The printable letter that stands for each byte: itself, or one from U+0100 on. */
  private static char[] letters() {
    char[] letters = new char[256];
    char next = 256;
    for (int value = 0; value < 256; value++) {
      boolean printable = value > 32 && value < 127 || value > 160 && value != 173;
      letters[value] = printable ? (char) value : next++;
    }
    return letters;
  }
}
