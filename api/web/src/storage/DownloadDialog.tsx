// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Has the node fetch a file from an address into a storage.
import { Button, Group, Modal, Select, Stack, TextInput } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import { useState, type FormEvent } from 'react';

import { ApiError, call, path } from '../api/client';
import { refresh } from '../api/queries';
import { ErrorNote } from '../app/ErrorPage';
import { useOpenTask } from '../app/navigation';
import { CONTENT_NAMES } from './ContentTab';
import { guessContent } from './UploadDialog';

interface DownloadProps {
  node: string;
  storage: string;
  contents: string[];
  onClose: () => void;
}

function fileName(url: string): string {
  try {
    return decodeURIComponent(new URL(url).pathname.split('/').pop() ?? '');
  } catch {
    return '';
  }
}

export function DownloadDialog({ node, storage, contents, onClose }: DownloadProps) {
  const [url, setUrl] = useState('');
  const [name, setName] = useState<string | null>(null);
  const [content, setContent] = useState<string | null>(null);
  const openTask = useOpenTask();
  const filename = name ?? fileName(url);
  const chosen = content ?? guessContent(filename, contents) ?? null;
  const start = useMutation({
    mutationFn: () => call<string>('POST', path`/nodes/${node}/storage/${storage}/download-url`, { url, filename, content: chosen ?? '' }),
    onSuccess: (upid) => {
      onClose();
      openTask(upid);
    },
    onSettled: refresh,
  });
  const errors = start.error instanceof ApiError ? start.error.errors : {};
  const submit = (event: FormEvent) => {
    event.preventDefault();
    start.mutate();
  };
  return (
    <Modal opened onClose={onClose} title={`Download to ${storage}`}>
      <form onSubmit={submit}>
        <Stack gap="sm">
          <TextInput label="URL" type="url" required data-autofocus value={url} error={errors['url']} onChange={(event) => setUrl(event.currentTarget.value)} />
          <TextInput label="File name" required value={filename} error={errors['filename']} onChange={(event) => setName(event.currentTarget.value)} />
          <Select label="Content" allowDeselect={false} value={chosen} error={errors['content']} onChange={setContent} data={contents.map((kind) => ({ value: kind, label: CONTENT_NAMES[kind] ?? kind }))} />
          <ErrorNote error={start.error} />
          <Group justify="flex-end" gap="xs">
            <Button variant="default" onClick={onClose}>
              Cancel
            </Button>
            <Button type="submit" loading={start.isPending} disabled={!url || !filename}>
              Download
            </Button>
          </Group>
        </Stack>
      </form>
    </Modal>
  );
}
