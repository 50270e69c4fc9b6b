// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Sends a file into a storage and shows how far it is.
import { Button, FileInput, Group, Modal, Progress, Select, Stack, Text } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import { useRef, useState } from 'react';

import { path, upload } from '../api/client';
import { refresh } from '../api/queries';
import { ErrorNote } from '../app/ErrorPage';
import { useOpenTask } from '../app/navigation';
import { bytes, percent } from '../lib/format';
import { CONTENT_NAMES } from './ContentTab';

interface UploadProps {
  node: string;
  storage: string;
  contents: string[];
  onClose: () => void;
}

/** What a file is, by its name; the first kind the storage takes otherwise. */
export function guessContent(name: string, contents: string[]): string | undefined {
  const guess = /\.iso$|\.img$/i.test(name) ? 'iso' : /\.tar(\.\w+)?$|\.tgz$/i.test(name) ? 'vztmpl' : /\.(qcow2|raw|vmdk|ova)$/i.test(name) ? 'import' : 'snippets';
  return contents.includes(guess) ? guess : contents[0];
}

export function UploadDialog({ node, storage, contents, onClose }: UploadProps) {
  const [file, setFile] = useState<File | null>(null);
  const [content, setContent] = useState<string | null>(contents[0] ?? null);
  const [sent, setSent] = useState(0);
  const abort = useRef<AbortController | null>(null);
  const openTask = useOpenTask();
  const send = useMutation({
    mutationFn: async () => {
      abort.current = new AbortController();
      return upload(path`/nodes/${node}/storage/${storage}/upload`, { content: content ?? '' }, file as File, setSent, abort.current.signal);
    },
    onSuccess: (upid) => {
      onClose();
      if (upid) openTask(upid);
    },
    onSettled: refresh,
  });
  const choose = (chosen: File | null) => {
    setFile(chosen);
    setContent((chosen && guessContent(chosen.name, contents)) ?? content);
  };
  const cancel = () => {
    abort.current?.abort();
    onClose();
  };
  return (
    <Modal opened onClose={cancel} title={`Upload to ${storage}`} closeOnClickOutside={!send.isPending}>
      <Stack gap="sm">
        <FileInput label="File" placeholder="Choose a file" value={file} onChange={choose} disabled={send.isPending} data-autofocus />
        <Select label="Content" allowDeselect={false} value={content} onChange={setContent} disabled={send.isPending} data={contents.map((name) => ({ value: name, label: CONTENT_NAMES[name] ?? name }))} />
        {send.isPending && file && (
          <div>
            <Progress value={sent * 100} aria-label="Sent" animated />
            <Text size="xs" c="dimmed" mt={4}>
              {sent < 1 ? `${bytes(sent * file.size)} of ${bytes(file.size)} (${percent(sent)})` : 'Sent; the node is checking it'}
            </Text>
          </div>
        )}
        <ErrorNote error={send.error} />
        <Group justify="flex-end" gap="xs">
          <Button variant="default" onClick={cancel}>
            Cancel
          </Button>
          <Button disabled={!file || !content} loading={send.isPending} onClick={() => send.mutate()}>
            Upload
          </Button>
        </Group>
      </Stack>
    </Modal>
  );
}
