package dev.bitcompile;

import android.app.Activity;
import android.content.Context;
import android.os.Bundle;
import android.system.Os;
import android.view.View;
import android.widget.Button;
import android.widget.EditText;
import android.widget.LinearLayout;
import android.widget.ScrollView;
import android.widget.TextView;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

/** One screen: a prompt, a button that starts and stops, and the text as it comes. */
public final class MainActivity extends Activity {
  private static final String PLUGIN = "libbitcompile_ops.so";
  private static final int CAPACITY = 512;
  private static final int MOST = 200;

  /** Everything that touches the model runs here, one thing after the other. */
  private final ExecutorService worker = Executors.newSingleThreadExecutor();

  private BitcompileModel model;
  private ByteLevelTokenizer tokenizer;
  private volatile boolean running;
  private EditText prompt;
  private Button button;
  private TextView answer;

  @Override
  protected void onCreate(Bundle state) {
    super.onCreate(state);
    prompt = new EditText(this);
    prompt.setText("The following example creates a table");
    button = new Button(this);
    button.setText("Generate");
    answer = new TextView(this);
    answer.setTextIsSelectable(true);
    ScrollView scroll = new ScrollView(this);
    scroll.addView(answer);
    LinearLayout column = new LinearLayout(this);
    column.setOrientation(LinearLayout.VERTICAL);
    column.setFitsSystemWindows(true);
    column.addView(prompt);
    column.addView(button);
    column.addView(scroll);
    setContentView(column);
    button.setOnClickListener(
        new View.OnClickListener() {
          @Override
          public void onClick(View view) {
            toggle();
          }
        });
  }

  private void toggle() {
    if (running) {
      running = false; // the listener sees it at the next token
      return;
    }
    running = true;
    button.setText("Stop");
    answer.setText("");
    final String text = prompt.getText().toString();
    worker.execute(
        new Runnable() {
          @Override
          public void run() {
            work(text);
          }
        });
  }

  private void work(String text) {
    try {
      open();
      model.rewind(0);
      final ByteLevelTokenizer.Stream stream = tokenizer.stream();
      long begin = System.nanoTime();
      int count =
          model
              .generate(
                  tokenizer.encode(text, true),
                  MOST,
                  new BitcompileModel.Listener() {
                    @Override
                    public boolean onToken(long token) {
                      show(stream.add(token));
                      return running;
                    }
                  })
              .size();
      show(String.format("\n\n%.1f tokens/s", count * 1e9 / (System.nanoTime() - begin)));
    } catch (Exception error) { // shown to the user, whatever it is
      show("\n" + error.getMessage());
    }
    finish("Generate");
  }

  private void open() throws Exception {
    if (model != null) {
      return;
    }
    final Context context = getApplicationContext();
    File folder = new File(getFilesDir(), "bitcompile");
    ArtifactFiles.Source assets =
        new ArtifactFiles.Source() {
          @Override
          public InputStream open(String name) throws IOException {
            return context.getAssets().open("bitcompile/" + name);
          }
        };
    ArtifactFiles.install(assets, folder);
    tokenizer = new ByteLevelTokenizer(new File(folder, "tokenizer.json"));
    // Read by plugins with GPU kernels: where compiled ones may lie. BITCOMPILE_OFFLOAD is the other
    // variable to set here, where `calibrate` was run on phones like this one.
    Os.setenv("BITCOMPILE_CACHE", getCodeCacheDir().getPath(), true);
    File plugin = new File(getApplicationInfo().nativeLibraryDir, PLUGIN);
    model = new BitcompileModel(folder, plugin, CAPACITY, BigCores.count());
  }

  private void show(final String text) {
    runOnUiThread(
        new Runnable() {
          @Override
          public void run() {
            answer.append(text);
          }
        });
  }

  private void finish(final String label) {
    running = false;
    runOnUiThread(
        new Runnable() {
          @Override
          public void run() {
            button.setText(label);
          }
        });
  }

  @Override
  protected void onDestroy() {
    running = false;
    worker.execute(
        new Runnable() {
          @Override
          public void run() {
            closeModel();
          }
        });
    worker.shutdown();
    super.onDestroy();
  }

  private void closeModel() {
    try {
      if (model != null) {
        model.close();
      }
    } catch (Exception error) {
      // the process is going away; there is nobody to tell
    }
  }
}
